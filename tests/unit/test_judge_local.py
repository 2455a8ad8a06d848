"""A local judge's expected scores, against whole forward passes."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedit.base import load_tokenizer
from fedit.interfaces import EngineError
from fedit.judge.local import LocalJudge
from fedit.judge.protocol import PAIRWISE, SINGLE, parse_grade, parse_pair
from fedit.judge.replies import Reply, Request

MESSAGES = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Which?"}]


def ask(judge: LocalJudge, *requests: Request) -> list[Reply | str]:
    replies: dict[int, Reply | str] = {}
    judge.ask(requests, lambda request, reply: replies.update({id(request): reply}))
    return [replies[id(request)] for request in requests]


def log_likelihood(model: torch.nn.Module, prompt: list[int], beginning: list[int]) -> float:
    ids = torch.tensor([prompt + beginning])
    with torch.no_grad():
        log_p = torch.log_softmax(model(ids).logits[0].double(), -1)
    return sum(float(log_p[len(prompt) + k - 1, token]) for k, token in enumerate(beginning))


def test_other_weights_in_the_same_folder_are_another_judge(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_model_folder, tmp_path / "judge")
    parameters = LocalJudge(str(folder), "likelihood", SINGLE).parameters
    assert LocalJudge(str(folder), "likelihood", SINGLE).parameters == parameters
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert LocalJudge(str(folder), "likelihood", SINGLE).parameters != parameters


def test_scores_are_expectations_over_all_beginnings(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = load_tokenizer(str(tiny_model_folder))
    prompt = tokenizer("Be kind.\n\nWhich?\n\n").input_ids
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids

    pairs = [(s, t) for s in range(1, 11) for t in range(1, 11)]
    weights = np.exp([log_likelihood(model, prompt, ids(f"{s} {t}\n")) for s, t in pairs])
    expected = weights @ np.array(pairs) / weights.sum()
    judge = LocalJudge(str(tiny_model_folder), "likelihood", PAIRWISE, device="cpu", dtype="float32")
    (reply,) = ask(judge, Request(MESSAGES))
    assert isinstance(reply, Reply)
    assert parse_pair(reply.text) == pytest.approx(tuple(expected), abs=1e-4)
    assert reply.prompt_tokens == len(prompt)

    weights = np.exp([log_likelihood(model, prompt, ids(f"Rating: [[{s}]]")) for s in range(1, 11)])
    judge = LocalJudge(str(tiny_model_folder), "likelihood", SINGLE, device="cpu", dtype="float32")
    (reply,) = ask(judge, Request(MESSAGES))
    assert isinstance(reply, Reply)
    assert parse_grade(reply.text) == pytest.approx((weights @ np.arange(1, 11) / weights.sum(),), abs=1e-4)


def test_written_reviews_are_the_models_own_and_do_not_depend_on_the_batch(tiny_model_folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = load_tokenizer(str(tiny_model_folder))
    texts = ["Which?", "Which of these two is the better one, and why?", "?"]
    judge = LocalJudge(str(tiny_model_folder), "generation", PAIRWISE, max_tokens=6, device="cpu", dtype="float32")
    replies = ask(judge, *(Request([{"role": "user", "content": text}]) for text in texts))
    for text, reply in zip(texts, replies, strict=True):
        prompt = torch.tensor([tokenizer(f"{text}\n\n").input_ids])
        output = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=6, do_sample=False)
        assert isinstance(reply, Reply)
        assert reply.text == str(tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)).strip()
        has_ended = tokenizer.eos_token_id in output[0, prompt.shape[1] :]
        assert reply.finish_reason == ("stop" if has_ended else "length")


def test_a_chat_template_is_used_and_may_refuse(tiny_model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "chat"
    folder.mkdir()
    for file in tiny_model_folder.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tokenizer = load_tokenizer(str(tiny_model_folder))
    template = "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[judge] "
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    (reply,) = ask(LocalJudge(str(folder), "likelihood", PAIRWISE, device="cpu"), Request(MESSAGES))
    assert isinstance(reply, Reply)
    text = "[system] Be kind.\n[user] Which?\n[judge] "
    assert reply.prompt_tokens == len(tokenizer(text, add_special_tokens=False).input_ids)
    tokenizer.chat_template = "{{ raise_exception('no system message here') }}"
    tokenizer.save_pretrained(folder)
    with pytest.raises(EngineError, match="no system message here"):
        ask(LocalJudge(str(folder), "likelihood", PAIRWISE, device="cpu"), Request(MESSAGES))


def test_what_does_not_fit_the_context_is_not_cut(tiny_model_folder: Path) -> None:
    judge = LocalJudge(str(tiny_model_folder), "likelihood", PAIRWISE, device="cpu")
    long, short = ask(judge, Request([{"role": "user", "content": "x" * 600}]), Request(MESSAGES))
    assert isinstance(long, str)
    assert "the prompt has 603 tokens" in long
    assert isinstance(short, Reply)
