"""What tasks written in YAML may call: rows as instruction and context, the generated rows, verdicts on answers.

A row is what fedit trains on: ``instruction``, ``context`` (may be absent), ``response`` and, where a program can
verify an answer, ``checks``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from fedit.evaluation.checks import exact_match, passes
from fedit.evaluation.metrics import rouge_l

if TYPE_CHECKING:
    from datasets import Dataset

_CONTEXT = "\n\n### Input:\n"
"""Between instruction and context in one text, as Stanford Alpaca writes it"""


def question(row: Mapping[str, Any]) -> str:
    """Return what a row asks, for ``doc_to_text``; the run's template will put the context where it has its place."""
    context = row.get("context") or ""
    return f"{row['instruction']}{_CONTEXT}{context}" if context else row["instruction"]


def split_context(text: str) -> tuple[str, str]:
    """Return instruction and context of what `question` returned; any other text is an instruction."""
    instruction, _, context = text.partition(_CONTEXT)
    return instruction, context


def score(row: Mapping[str, Any], answers: Sequence[str]) -> dict[str, float]:
    """Return the verdict on a row's answer and its ROUGE-L, for ``process_results``.

    The verdict is that of the row's ``checks``, as a mapping or as JSON, or exact match where it has none.

    Raises:
        DataError: the checks are malformed.
    """
    answer, response, checks = answers[0], row["response"], row.get("checks")
    if isinstance(checks, str):
        checks = json.loads(checks)
    passed = passes(checks, answer) if checks else exact_match(answer, response)
    return {"exact_match": float(passed), "rouge_l": rouge_l(answer, response)}


def pasture(*, run_seed: str = "0", **_: Any) -> dict[str, Dataset]:
    """Return the held-out rows of ``builtin:pasture`` for the run's seed, for ``custom_dataset``: no run of that seed
    trained on them. lm-eval tells the function a task's whole metadata.
    """
    from datasets import Dataset

    from fedit.builtin import pasture as builtin

    rows = builtin.generate(int(run_seed))[1]
    # A table's column has values of one form; checks have many.
    plain: list[Any] = [{**row, "checks": json.dumps(row["checks"])} for row in rows]
    return {"test": Dataset.from_list(plain)}
