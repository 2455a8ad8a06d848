"""What a finished run came to, as one flat mapping that JSON holds; and how each number is shown."""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from fedit.report import RunFolder
from fedit.report.format import METRIC_LABELS

BASELINES = ("base", "local", "central")
GONE = "gone"
"""In place of the digest of the test rows: the answers, which had them, were deleted"""


@dataclass(frozen=True)
class Measure:
    """How a measure is shown."""

    heading: str
    digits: int = 3
    unit: Literal["plain", "percent", "bytes", "count"] = "plain"
    better: Literal[-1, 0, 1] = 0
    """1: higher is better; -1: lower; 0: neither is"""
    is_detail: bool = False
    """Not for the table on the terminal"""


MEASURES = {
    "response_loss": Measure("Response loss", 3, better=-1),
    "difference": Measure("Difference", 4),
    "worst_client": Measure("Worst client", 3, better=-1, is_detail=True),
    "exact_match": Measure("Exact match", 1, "percent", better=1),
    "rouge_l": Measure("ROUGE-L", 3, better=1),
    "unseen_clients": Measure("Unseen clients", 3, better=-1, is_detail=True),
    "unseen_categories": Measure("Unseen categories", 3, better=-1, is_detail=True),
    "gap_closed": Measure("Gap closed", 1, "percent", better=1),
    "preference_accuracy": Measure("Preferred", 1, "percent", better=1),
    "attack_success": Measure("Attack success", 1, "percent", better=-1),
    "epsilon": Measure("Epsilon", 2),
    "tokens": Measure("Training tokens", unit="count", is_detail=True),
    "bytes_up": Measure("Up", unit="bytes"),
    "bytes_down": Measure("Down", unit="bytes", is_detail=True),
    "aggregation_s": Measure("Server, s", 3, is_detail=True),
    "aggregation_loss": Measure("Aggregation loss", 4, is_detail=True),
}
"""The difference is that of the response loss to the reference's run of the same seed. Bytes are per client and round,
both ways as messages; the server's seconds are the median round's, for the aggregation; the aggregation loss is the
mean over rounds. The worst client's loss is there where the federated model is the clients' own ones; unseen are the
losses on what no model was trained on."""


def measure_run(run: RunFolder) -> dict[str, Any]:
    """Return the measures of a finished run, without those that it has not.

    Beside `MEASURES`: ``bytes`` of the whole run, both ways; each baseline's loss under its name, its other metrics as
    ``local_exact_match``, ...; ``curve``, the losses by round; ``by_category``; ``command``; and digests of the test
    rows' texts and of their numbers of tokens, which tell whether two runs can be compared.
    """
    evaluation, models = run.evaluation, run.evaluation["models"]
    federated = models["federated"]
    values = {
        **_metrics(federated),
        "worst_client": evaluation.get("federated_worst_client", {}).get("response_loss"),
        "preference_accuracy": evaluation.get("preference_accuracy", {}).get("federated"),
        "attack_success": evaluation.get("attack", {}).get("success", {}).get("federated"),
        "epsilon": run.rounds[-1].get("epsilon") if run.rounds else None,
        **_costs(run),
    }
    values |= _unseen(evaluation, "federated")
    for name in BASELINES:
        found = {**_metrics(models[name]), **_unseen(evaluation, name)} if name in models else {}
        for metric, value in found.items():
            values[name if metric == "response_loss" else f"{name}_{metric}"] = value
    if "worst_client" in evaluation:
        values["local_worst_client"] = evaluation["worst_client"]["response_loss"]
    values["curve"] = {key: [line.get(key) for line in run.rounds] for key in ("round", "train_loss", "test_loss")}
    values["by_category"] = {
        metric: {name: value for name, value in federated[metric].items() if name != "all"}
        for metric in METRIC_LABELS
        if metric in federated
    }
    values |= {"command": run.config.get("command"), **_test_rows(run)}
    return {name: value for name, value in values.items() if value is not None}


def _metrics(model: Mapping[str, Any]) -> dict[str, Any]:
    found = {metric: model[metric]["all"] for metric in METRIC_LABELS if metric in model}
    return {**found, "tokens": model["tokens"]}


def _unseen(evaluation: Mapping[str, Any], model: str) -> dict[str, Any]:
    kinds = [kind for kind in ("unseen_clients", "unseen_categories") if kind in evaluation]
    return {kind: evaluation[kind]["models"][model]["response_loss"]["all"] for kind in kinds}


def _costs(run: RunFolder) -> dict[str, Any]:
    contacted = sum(len(line["cohort"]) for line in run.rounds)
    client_rounds = sum(len(line["cohort"]) - len(line["failures"]) for line in run.rounds)
    up, down = (sum(line[f"bytes_{way}"] for line in run.rounds) for way in ("up", "down"))
    losses = [line["aggregation_loss"] for line in run.rounds if line["aggregation_loss"] is not None]
    seconds = [line["aggregation_seconds"] for line in run.timings if "aggregation_seconds" in line]
    return {
        "bytes": up + down if contacted else None,
        "bytes_up": up / client_rounds if client_rounds else None,
        "bytes_down": down / contacted if contacted else None,
        "aggregation_s": statistics.median(seconds) if seconds else None,
        "aggregation_loss": statistics.fmean(losses) if losses else None,
    }


def _test_rows(run: RunFolder) -> dict[str, str]:
    """Return digests of the test rows, from the answers of the first model, which has all of them."""
    texts, sizes = hashlib.sha256(), hashlib.sha256()
    first = None
    for line in run.answers():
        if line["model"] != (first := first or line["model"]):
            break
        texts.update(row_key(line))
        sizes.update(f"{line['num_tokens']} ".encode())
    if first is None:
        return {"test_rows": GONE}
    return {"test_rows": texts.hexdigest()[:16], "test_tokens": sizes.hexdigest()[:16]}


def row_key(line: Mapping[str, Any]) -> bytes:
    """Return a digest of what makes a test row the row that it is, from a line of ``answers.jsonl``."""
    texts = [line[key] for key in ("category", "instruction", "context", "reference")]
    return hashlib.sha256(json.dumps(texts).encode()).digest()[:16]
