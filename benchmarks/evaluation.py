"""Benchmarks of a run's models: all at once, one after the other, and each in lm-eval's own model with PEFT.

    python benchmarks/evaluation.py runs/default

The requests are those of the task `pasture`: one answer to generate for each row, and the likelihood of four
responses, or of four single tokens, to each. Every side gets the same text. lm-eval's own model (HFLM) loads the
federated adapter for every model but the base, which costs the same; its likelihoods and answers are compared.
"""

from __future__ import annotations

import argparse
import logging
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fedit.base import load_tokenizer
from fedit.benchmarks.harness import HarnessModel
from fedit.benchmarks.rows import pasture, question
from fedit.builtin import CRIA_FOLDER
from fedit.console import quiet
from fedit.run_models import BASE, FEDERATED, RunModels, resolve_names

NAMES = (BASE, "local", "central", FEDERATED)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("run", type=Path)
    arguments.add_argument("--batch-size", type=int, default=32, help="of lm-eval's own model")
    arguments.add_argument("--rows", type=int, default=320)
    arguments.add_argument("--repetitions", type=int, default=3)
    chosen = arguments.parse_args()
    quiet()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    models = RunModels.open(chosen.run, resolve_names(chosen.run, NAMES))
    requests = _requests(models, chosen.rows)
    sides: dict[str, Callable[[str, list[Instance]], dict[str, list[Any]]]] = {
        "fedit, all at once": lambda kind, asked: _fedit(models, list(models.adapters), kind, asked),
        "fedit, one by one": lambda kind, asked: {
            name: _fedit(models, [name], kind, asked)[name] for name in models.adapters
        },
        "lm-eval with PEFT": _Reference(models, chosen.run, chosen.batch_size),
    }
    for workload, (kind, asked) in requests.items():
        print(f"{workload}: {len(asked)} requests to each of {len(models.adapters)} models")
        answers: dict[str, list[Any]] = {}
        seconds: dict[str, list[tuple[float, float]]] = {side: [] for side in sides}
        for _ in range(chosen.repetitions):
            for side, ask in sides.items():
                before = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
                answers[side] = ask(kind, asked)[FEDERATED]
                after = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF).ru_utime
                seconds[side].append((after[0] - before[0], after[1] - before[1]))
        reference = answers["lm-eval with PEFT"]
        for side, taken in seconds.items():
            wall, cpu = np.median(np.array(taken), axis=0)
            print(f"  {side:20} {wall:7.2f} s  {cpu:7.2f} CPU s   {_agreement(kind, answers[side], reference)}")


def _requests(models: RunModels, num_rows: int) -> dict[str, tuple[str, list[Instance]]]:
    rows = pasture(run_seed=str(models.config.seed))["test"].to_list()[:num_rows]
    harness = HarnessModel(models)
    texts = [harness.apply_chat_template([{"role": "user", "content": question(row)}]) for row in rows]
    responses = [row["response"] for row in rows]
    options = {"until": [], "max_gen_toks": 64, "do_sample": False}
    return {
        "answers": (
            "generate_until",
            [Instance("generate_until", {}, (text, dict(options)), number) for number, text in enumerate(texts)],
        ),
        "four responses": (
            "loglikelihood",
            [
                Instance("loglikelihood", {}, (text, responses[(number + other) % len(rows)]), other)
                for number, text in enumerate(texts)
                for other in range(4)
            ],
        ),
        "four single tokens": (
            "loglikelihood",
            [Instance("loglikelihood", {}, (text, letter), n) for text in texts for n, letter in enumerate("abcd")],
        ),
    }


def _fedit(models: RunModels, names: list[str], kind: str, asked: list[Instance]) -> dict[str, list[Any]]:
    harness = HarnessModel(RunModels(models.config, models.model, {name: models.adapters[name] for name in names}))
    found = {}
    for name in names:
        harness.name = name
        found[name] = getattr(harness, kind)(asked)
    return found


class _Reference:
    def __init__(self, models: RunModels, run: Path, batch_size: int) -> None:
        path = models.config.model.path
        tokenizer = load_tokenizer(path)
        tokenizer.pad_token = tokenizer.eos_token
        place = CRIA_FOLDER if path.startswith("builtin:") else path
        self._models = {}
        for name in models.adapters:
            base = AutoModelForCausalLM.from_pretrained(place, dtype=models.model.base.dtype)
            tuned = base if name == BASE else PeftModel.from_pretrained(base, str(run / "adapter"))
            self._models[name] = HFLM(
                pretrained=tuned, tokenizer=tokenizer, batch_size=batch_size, device="cpu", softmax_dtype="float32"
            )

    def __call__(self, kind: str, asked: list[Instance]) -> dict[str, list[Any]]:
        return {name: getattr(model, kind)(asked, disable_tqdm=True) for name, model in self._models.items()}


def _agreement(kind: str, got: list[Any], expected: list[Any]) -> str:
    if kind == "generate_until":
        return f"{np.mean([one == two for one, two in zip(got, expected, strict=True)]):.1%} the same text"
    ours, theirs = (np.array([value for value, _ in side]) for side in (got, expected))
    difference = np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)
    greedy = np.mean([one[1] == two[1] for one, two in zip(got, expected, strict=True)])
    return f"log-likelihoods differ by {difference:.1%}, {greedy:.1%} the same is_greedy"


if __name__ == "__main__":
    main()
