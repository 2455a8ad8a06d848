"""Pre-train builtin:cria, the base model that ships with fedit, on builtin:pasture's prose.

    python scripts/pretrain_cria.py

writes tokenizer and weights to src/fedit/builtin/cria and prints the held-out loss and what the model knows. Everything
follows from --seed; bits may differ between machines, because float sums do.
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedit.builtin.pasture import corpus, generate, probes

DEFAULT_OUT = Path(__file__).resolve().parent.parent / "src/fedit/builtin/cria"
BOS, EOS = "<s>", "</s>"
HELD_OUT_SEED_OFFSET = 1_000_003
# cl100k's split (letters take one leading space, punctuation takes the line breaks after it) without contractions.
WORDS = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+\n*|\s*\n+|\s+")


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    tokenizer = train_tokenizer(arguments.vocabulary, arguments.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=arguments.hidden,
            intermediate_size=arguments.hidden * 8 // 3 // 32 * 32,
            num_hidden_layers=arguments.layers,
            num_attention_heads=arguments.hidden // 32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens in the vocabulary", flush=True)
    pretrain(model, tokenizer, arguments)
    model.to(torch.bfloat16)
    print(json.dumps({"knows": probe(model, tokenizer, arguments.seed)}, indent=1))
    model.save_pretrained(arguments.out)
    tokenizer.save_pretrained(arguments.out)
    size = sum(path.stat().st_size for path in arguments.out.iterdir())
    print(f"saved to {arguments.out} ({size / 1e6:.1f} MB)")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT)
    parser.add_argument("--tokens", type=float, default=16e6, help="tokens to train on")
    parser.add_argument("--hidden", type=int, default=160, help="hidden size, a multiple of 32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=1536)
    parser.add_argument("--length", type=int, default=160, help="tokens in a sequence")
    parser.add_argument("--batch", type=int, default=16, help="sequences in a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def train_tokenizer(vocabulary: int, seed: int) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer.

    Its text includes instructions and the prompt templates' headers, so that prompts are short; the model itself is
    never trained on them. A word at the start of a text or line gets the leading space it has elsewhere: " wool" is
    one and the same token in a sentence, after "### Response:" and a line break, and in a response encoded alone.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.Prepend(" "),
            normalizers.Replace("\n", "\n "),
            normalizers.Replace("\n \n", "\n\n"),
            normalizers.Replace(Regex(r"\n \z"), "\n"),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteLevel(), decoders.Replace("\n ", "\n"), decoders.Strip(" ", 1, 0)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[BOS, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(itertools.chain(corpus(20_000, seed), _prompts(seed)), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS)


def _prompts(seed: int) -> Iterator[str]:
    rows, _ = generate(seed)
    for row in rows:
        yield f"### Instruction:\n{row['instruction']}\n\n### Input:\n{row['context']}\n\n### Response:\n"


def pretrain(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace) -> None:
    """Train on consecutive blocks of the corpus with AdamW, a linear warm-up and a cosine decay, in bfloat16."""
    tokens_per_step = arguments.batch * arguments.length
    num_steps = int(arguments.tokens // tokens_per_step)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=arguments.learning_rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.02 + 0.98 * (1 + math.cos(math.pi * step / num_steps)) / 2)
    )
    held_out = list(itertools.islice(blocks(tokenizer, arguments, arguments.seed + HELD_OUT_SEED_OFFSET), 8))
    started = time.perf_counter()
    for step, ids in enumerate(itertools.islice(blocks(tokenizer, arguments, arguments.seed), num_steps)):
        loss = language_loss(model, ids)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 100 == 0 or step == num_steps - 1:
            with torch.no_grad():
                held_out_loss = sum(language_loss(model, block).item() for block in held_out) / len(held_out)
            seconds = time.perf_counter() - started
            line = {"step": step, "of": num_steps, "tokens": (step + 1) * tokens_per_step, "loss": loss.item()}
            print(json.dumps(line | {"held_out_loss": held_out_loss, "seconds": seconds}), flush=True)
        if step % 1000 == 999:
            print(json.dumps(probe(model, tokenizer, arguments.seed)), flush=True)


def language_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return model(input_ids=ids, labels=ids).loss


@torch.no_grad()
def probe(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, seed: int) -> dict[str, float]:
    """Return for each skill the share of texts that the model continues right, every token the most likely one."""
    right: dict[str, list[bool]] = {}
    for skill, text, continuation in probes(100, seed + HELD_OUT_SEED_OFFSET):
        before = tokenizer(text, add_special_tokens=False)["input_ids"]
        after = tokenizer(continuation, add_special_tokens=False)["input_ids"]
        ids = torch.tensor([[tokenizer.bos_token_id, *before, *after]])
        predicted = model(input_ids=ids).logits[0, -len(after) - 1 : -1].argmax(-1)
        right.setdefault(skill, []).append(predicted.tolist() == after)
    return {skill: round(sum(hits) / len(hits), 3) for skill, hits in right.items()}


def blocks(tokenizer: PreTrainedTokenizerFast, arguments: argparse.Namespace, seed: int) -> Iterator[torch.Tensor]:
    """Yield int64 [batch, length] blocks of an endless stream `<s> document </s> <s> document </s> ...`."""
    documents, buffer = corpus(2**62, seed), []
    wanted = arguments.batch * arguments.length
    while True:
        while len(buffer) < wanted:
            texts = list(itertools.islice(documents, 256))
            for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                buffer += [tokenizer.bos_token_id, *ids, tokenizer.eos_token_id]
        block, buffer = buffer[:wanted], buffer[wanted:]
        yield torch.from_numpy(np.array(block)).view(arguments.batch, arguments.length)


if __name__ == "__main__":
    main()
