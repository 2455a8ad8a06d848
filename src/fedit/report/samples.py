"""Which answers the page shows: chosen by a fixed rule, never by how they look."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fedit.report.folder import RunFolder

MAX_CATEGORIES = 12


@dataclass(frozen=True, slots=True)
class Sample:
    """A test row and what the models answered."""

    row: Mapping[str, Any]
    """Any model's line: category, instruction, context, reference"""
    answers: Mapping[str, Mapping[str, Any]]
    """By model, in the page's order; ``local`` is the median client's, as is ``federated`` if each has its own"""


@dataclass(frozen=True, slots=True)
class Samples:
    """The first test row of each category, in the order of the test set."""

    rows: list[Sample]
    num_left_out: int
    """Categories beyond `MAX_CATEGORIES`"""
    local_client: str | None
    """The local-only client shown: the (lower) median by response loss"""


def choose_samples(run: RunFolder) -> Samples:
    """Read the answers once, and keep the first row of each category."""
    first: dict[str, int] = {}
    lines: dict[str, dict[str, Mapping[str, Any]]] = {}
    nll: defaultdict[str, float] = defaultdict(float)
    num_tokens: defaultdict[str, int] = defaultdict(int)
    for line in run.answers():
        category, model = line["category"], line["model"]
        nll[model] += line["nll"]
        num_tokens[model] += line["num_tokens"]
        if line.get("answer") is None or line["index"] > first.get(category, line["index"]):
            continue
        if line["index"] != first.get(category):
            first[category], lines[category] = line["index"], {}
        lines[category][model] = line

    losses = {model: nll[model] / max(1, num_tokens[model]) for model in nll}
    median = _median(losses, "local/")
    names = {"base": "base", "local": median, "central": "central"}
    names["federated"] = _median(losses, "federated/") or "federated"
    rows = [
        Sample(
            row=next(iter(lines[category].values())),
            answers={name: lines[category][key] for name, key in names.items() if key in lines[category]},
        )
        for category in sorted(first, key=first.__getitem__)
    ]
    return Samples(
        rows=rows[:MAX_CATEGORIES],
        num_left_out=max(0, len(rows) - MAX_CATEGORIES),
        local_client=median.removeprefix("local/") if median else None,
    )


def _median(losses: Mapping[str, float], prefix: str) -> str | None:
    """Return the model of the (lower) median loss among those of clients."""
    owned = {
        model: math.inf if math.isnan(loss) else loss for model, loss in losses.items() if model.startswith(prefix)
    }
    by_loss = sorted(owned, key=owned.__getitem__)
    return by_loss[(len(by_loss) - 1) // 2] if by_loss else None
