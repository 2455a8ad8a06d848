"""builtin:pasture, a generated instruction dataset whose every answer a program can verify.

Rows speak about an invented valley (`world`) in Dolly's eight categories (`tasks`); each carries `checks`, the
specification by which `fedit.evaluation.checks.passes` judges any generated answer. `corpus` yields plain prose
about the same valley, on which the base model `builtin:cria` was pre-trained: it states the facts, and never
asks; `probes` tells what such a base should be able to continue.
"""

import hashlib
from typing import Any

import numpy as np

from fedit.builtin.pasture.prose import corpus, probes
from fedit.builtin.pasture.tasks import TASKS, Task
from fedit.interfaces import derive_rng

__all__ = ["CATEGORIES", "corpus", "generate", "probes"]

CATEGORIES = tuple(TASKS)

_OPENERS = ("", "Please help. ", "Here is a task. ", "One more. ")
_TEST_FRACTION = 0.2


def generate(
    seed: int, *, num_train: int = 2400, num_test: int = 320
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return training and test rows with the keys instruction, context, response, category and checks.

    Rows come in random order, the categories equally often (the first ones once more where the number does not divide
    by eight). What answering needs - a fact for open_qa, a topic for brainstorming, a composition elsewhere - belongs
    either to training or to test; which one, the seed decides. Of the wordings, some combinations occur in test only.
    """
    return _rows(seed, "train", num_train), _rows(seed, "test", num_test)


def _rows(seed: int, split: str, count: int) -> list[dict[str, Any]]:
    rows = []
    for index, (category, draw) in enumerate(TASKS.items()):
        rng = derive_rng(seed, "builtin:pasture", split, category)
        wanted = count // len(TASKS) + (index < count % len(TASKS))
        while wanted:
            task = draw(rng)
            if _is_test(seed, category, task.key) != (split == "test"):
                continue
            wanted -= 1
            rows.append(
                {
                    "instruction": _word(rng, task, split),
                    "context": task.context,
                    "response": task.response,
                    "category": category,
                    "checks": task.checks,
                }
            )
    order = derive_rng(seed, "builtin:pasture", split, "order").permutation(len(rows))
    return [rows[index] for index in order]


def _is_test(seed: int, category: str, key: str) -> bool:
    digest = hashlib.sha256(f"{seed} {category} {key}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < _TEST_FRACTION * 2**32


def _word(rng: np.random.Generator, task: Task, split: str) -> str:
    """Join an opener and a wording; every fourth of the combinations is kept for test."""
    while True:
        opener, wording = int(rng.integers(len(_OPENERS))), int(rng.integers(len(task.wordings)))
        if split == "test" or (opener + wording) % 4 != 3:
            return _OPENERS[opener] + task.wordings[wording]
