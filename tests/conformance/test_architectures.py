"""Stacked LoRA works on any causal LM: the same losses as PEFT's model of the exported adapter."""

from __future__ import annotations

import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from fedit.attention import BLOCK, NAME
from fedit.base import find_targets, load_base, load_tokenizer
from fedit.batch import Batch
from fedit.config import AdapterConfig, ModelConfig, RunConfig, load_plugins
from fedit.export import save_adapter
from fedit.interfaces import Adapter, EncodedExample, EngineError, Example, Turn
from fedit.model import StackedModel

SMALL: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 258,
    "max_position_embeddings": 128,
    "pad_token_id": None,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 258, "eos_token_id": 1},
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 80},  # shorter than the longest row: its mask must be obeyed
    "minicpm3": SMALL  # keys and values of different widths
    | {
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_nope_head_dim": 8,
        "qk_rope_head_dim": 4,
        "v_head_dim": 6,
        "num_key_value_heads": 4,
        "head_dim": 4,
    },
    "qwen2": SMALL,
    "qwen3": SMALL,
    "gemma2": SMALL | {"final_logit_softcapping": 3.0, "sliding_window": 8},
    "phi3": SMALL,
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "vocab_size": 258,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 32,
    },
}


@pytest.fixture(params=ARCHITECTURES)
def folder(request: pytest.FixtureRequest, tmp_path: Path, tiny_model_folder: Path) -> Path:
    """A random model of the architecture with the tiny model's tokenizer."""
    config = AutoConfig.for_model(request.param, **ARCHITECTURES[request.param])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    load_tokenizer(str(tiny_model_folder)).save_pretrained(tmp_path)
    return tmp_path


def stacked(folder: Path) -> StackedModel:
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), torch.device("cpu"))
    return StackedModel(base, load_tokenizer(str(folder)), AdapterConfig(rank=3, alpha=6))


def random_adapter(model: StackedModel) -> Adapter:
    fresh = model.fresh_adapter(np.random.default_rng(1))
    generator = torch.Generator().manual_seed(2)
    return fresh.with_tensors(
        {name: tensor + 0.1 * torch.randn(tensor.shape, generator=generator) for name, tensor in fresh.tensors.items()}
    )


def examples() -> list[EncodedExample]:
    rng = np.random.default_rng(3)
    rows = []
    for length in (9, BLOCK + 26, 5, BLOCK + 26):
        ids = rng.integers(2, 258, length).astype(np.int32)
        rows.append(EncodedExample(ids, np.arange(length) >= length - 4, Example((Turn("", ""),))))
    return rows


def peft_losses(model: torch.nn.Module, example: EncodedExample) -> torch.Tensor:
    ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
    with torch.inference_mode():
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[example.supervised[1:]]


PACKED = {"gpt2", "llama", "minicpm3", "qwen2", "qwen3", "phi3", "opt"}


def test_which_architectures_are_packed(folder: Path) -> None:
    """Short rows: mistral's window is 80 tokens, and gemma2 caps its attention's scores."""
    model = stacked(folder)
    kind = model.base.config.model_type
    assert model.longest_packed == {"mistral": 80}.get(kind, math.inf if kind in PACKED else 0)


def test_losses_equal_peft_of_the_exported_adapter(folder: Path, tmp_path: Path) -> None:
    load_plugins()
    model = stacked(folder)
    adapter = random_adapter(model)
    model.allocate(2)
    model.write(1, adapter)
    config = RunConfig.model_validate({"model": {"path": str(folder)}})
    save_adapter(adapter, config, model, tmp_path / "adapter")
    reference = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter")
    adapted = {
        name.removesuffix(".lora_A.default") for name, _ in reference.named_modules() if ".lora_A.default" in name
    }
    assert {f"base_model.model.{layer.name}" for layer in model.layers} == adapted

    slots, device = [0, 1, 1, 0], torch.device("cpu")
    rows = examples()
    expected = []
    for row, slot in zip(rows, slots, strict=True):
        with nullcontext() if slot else reference.disable_adapter():
            expected.append(peft_losses(reference, row))
    for batch in (Batch.pad(rows, slots, device), *_packed(model, rows, slots)):
        losses, row_of_token = model.token_losses(batch)
        for index in range(len(rows)):
            torch.testing.assert_close(losses[row_of_token == index], expected[index], rtol=1e-4, atol=1e-5)


def _packed(model: StackedModel, rows: list[EncodedExample], slots: list[int]) -> list[Batch]:
    longest = max(len(row) for row in rows)
    return [Batch.pack(rows, slots, torch.device("cpu"))] if longest <= model.longest_packed else []


def test_head_is_not_adapted_and_targets_select(folder: Path) -> None:
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), torch.device("cpu"))
    everything = find_targets(base, "all-linear")
    assert everything
    assert base.get_output_embeddings() not in everything.values()
    ending = next(iter(everything)).rpartition(".")[2]
    chosen = find_targets(base, [ending])
    assert chosen
    assert all(name.endswith(f".{ending}") for name in chosen)
    with pytest.raises(EngineError, match=f"Did you mean '{ending}'"):
        find_targets(base, [ending + "x"])


def test_sparse_attention_is_left_to_torch(tmp_path: Path) -> None:
    """Its code hands the mask of the chosen keys to attention of known names only."""
    small = ARCHITECTURES["minicpm3"] | {
        "first_k_dense_replace": 2,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 16,
    }
    config = AutoConfig.for_model("deepseek_v32", **small)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).float().save_pretrained(tmp_path)
    base = load_base(ModelConfig(path=str(tmp_path), dtype="float32"), torch.device("cpu"))
    assert base.config._attn_implementation == "sdpa"


def test_usual_models_attend_in_blocks(tiny_model_folder: Path) -> None:
    base = load_base(ModelConfig(path=str(tiny_model_folder), dtype="float32"), torch.device("cpu"))
    assert base.config._attn_implementation == NAME
