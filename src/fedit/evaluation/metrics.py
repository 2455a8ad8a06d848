"""Predictions on held-out rows -> ``evaluation.json``: three metrics by category, with bootstrap intervals.

All models of a run answer the same rows with the same tokenizer, so every number here is one ratio,
``sum of a score over rows / sum of its sizes``. The mean over local-only clients and the difference of two models are
such ratios too (of the rows' mean and difference), which makes each of their intervals a paired one.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rouge_score.rouge_scorer import RougeScorer

from fedit.interfaces import DataError, derive_rng

NUM_RESAMPLES = 1000
LOCAL_PREFIX, FEDERATED_PREFIX, PERSONAL_PREFIX = "local/", "federated/", "personal/"
"""In front of a client's name: the model that it tuned alone; the federation's, with factors of the client's own; the
client's own, tuned beside the federation's"""

Scores = Mapping[str, np.ndarray]
"""By metric, one number per test row [N]: nats for ``response_loss``, 0 to 1 for the two others."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What one model did with one test row: a line of ``answers.jsonl``."""

    model: str
    """``base``, ``central``, ``federated``, or a client's: ``local/<client>``, ``federated/<client>``, ..."""
    index: int
    """Of the row in the test set."""
    category: str
    instruction: str
    context: str
    reference: str
    answer: str | None
    """The generated answer; None (and so are `passed` and `rouge_l`): only the loss was measured."""
    passed: bool | None
    rouge_l: float | None
    nll: float
    """Summed over the response tokens, nats."""
    num_tokens: int
    """Response tokens, end-of-sequence token included."""


@dataclass(frozen=True, slots=True, eq=False)
class _TestRows:
    groups: Mapping[str, np.ndarray]
    """``all`` and every category -> positions of its rows"""
    draws: Mapping[str, np.ndarray]
    """By group, float64 [1 + resamples, rows]: how often each row counts; the first line is all ones: the test set"""
    num_tokens: np.ndarray
    """float64 [N]"""


def rouge_l(generated: str, reference: str) -> float:
    """Return ROUGE-L, F-measure with stemming, in [0, 1].

    It compares sequences of the letters a to z and digits: text in other scripts scores 0.
    """
    return float(_rouge_scorer().score(reference, generated)["rougeL"].fmeasure)


@functools.cache
def _rouge_scorer() -> RougeScorer:
    return RougeScorer(["rougeL"], use_stemmer=True)


def summarise(
    predictions_by_model: Mapping[str, Sequence[Prediction]], tokens: Mapping[str, int], seed: int
) -> dict[str, Any]:
    """Return the content of ``evaluation.json``.

    A metric that was not measured is absent. A loss that is not finite, because the model diverged, is None. A group
    of fewer than two rows has no interval.

    Args:
        predictions_by_model: by the name of the model, one prediction for each test row.
        tokens: by the name of the model, the tokens it was trained on.
        seed: of the bootstrap.

    Raises:
        DataError: the models did not answer the same rows, or a category is named ``all``.
    """
    rows = _test_rows(predictions_by_model, seed)
    scores = {name: _scores(predictions) for name, predictions in predictions_by_model.items()}
    owned: dict[str, dict[str, Scores]] = {}
    for prefix in (LOCAL_PREFIX, FEDERATED_PREFIX, PERSONAL_PREFIX):
        clients = {name: scores.pop(name) for name in list(scores) if name.startswith(prefix)}
        if clients:
            kind = prefix.removesuffix("/")
            owned[kind] = clients
            scores[kind] = _combine(list(clients.values()), lambda values: np.mean(values, axis=0))
            tokens = {**tokens, kind: round(np.mean([tokens[name] for name in clients]))}

    models = {name: {**_measure(rows, scores[name]), "tokens": tokens[name]} for name in _in_order(scores)}
    result: dict[str, Any] = {
        "models": models,
        "num_test_rows": {group: len(positions) for group, positions in rows.groups.items()},
        **_gap_closed(rows, scores),
        "differences": {
            f"federated_minus_{other}": _measure(rows, _combine([scores["federated"], scores[other]], _difference))
            for other in ("local", "central")
            if "federated" in scores and other in scores
        },
    }
    for kind, clients in owned.items():
        per_client = {
            name.removeprefix(f"{kind}/"): {**_measure(rows, own), "tokens": tokens[name]}
            for name, own in clients.items()
        }
        models[kind]["per_client"] = per_client
        worst = _worst_clients(per_client)
        result |= worst if kind == "local" else {f"{kind}_{name}": value for name, value in worst.items()}
    return result


def mean_interval(values: np.ndarray, seed: int, name: str) -> list[float] | None:
    """Return the 95% bootstrap interval, over rows, of the mean of `values` [N]; None of fewer than two.

    Equal `seed` and `name` draw the same rows.
    """
    return _interval(_draws(len(values), seed, name)[1:] @ values / len(values)) if len(values) > 1 else None


def _in_order(scores: Mapping[str, Scores]) -> list[str]:
    usual = ("base", "local", "central", "federated", "personal")
    return [name for name in usual if name in scores] + [name for name in scores if name not in usual]


def _test_rows(predictions_by_model: Mapping[str, Sequence[Prediction]], seed: int) -> _TestRows:
    names = list(predictions_by_model)
    expected = [(row.index, row.category, row.num_tokens) for row in predictions_by_model[names[0]]] if names else []
    if not expected:
        raise DataError("No predictions to summarise: expected at least one model and one test row.")
    for name in names:
        got = [(row.index, row.category, row.num_tokens) for row in predictions_by_model[name]]
        if got != expected:
            raise DataError(
                f"Model {name!r} and model {names[0]!r} did not answer the same {len(expected)} test rows in the same "
                f"order with the same response tokens ({len(got)} rows from {name!r}). Evaluate all models on one test "
                "set."
            )
    categories = np.array([category for _, category, _ in expected])
    if "all" in categories:
        raise DataError("A category is named 'all', which stands for the whole test set. Rename it in the data.")
    groups = {"all": np.arange(len(expected))}
    groups |= {str(category): np.flatnonzero(categories == category) for category in dict.fromkeys(categories)}
    draws = {group: _draws(len(positions), seed, group) for group, positions in groups.items()}
    return _TestRows(groups, draws, np.array([num_tokens for _, _, num_tokens in expected], dtype=np.float64))


def _draws(num_rows: int, seed: int, group: str) -> np.ndarray:
    rng = derive_rng(seed, "bootstrap", group)
    draws = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    return np.concatenate([np.ones((1, num_rows)), draws])


def _scores(predictions: Sequence[Prediction]) -> Scores:
    losses = np.array([row.nll for row in predictions], dtype=np.float64)
    scores = {"response_loss": np.where(np.isnan(losses), np.inf, losses)}
    if all(row.answer is not None for row in predictions):
        scores["exact_match"] = np.array([row.passed for row in predictions], dtype=np.float64)
        scores["rouge_l"] = np.array([row.rouge_l for row in predictions], dtype=np.float64)
    return scores


def _combine(parts: Sequence[Scores], function: Any) -> Scores:
    """Apply `function` to the stacked rows [parts, N] of every metric that all parts have."""
    with np.errstate(invalid="ignore"):
        return {
            metric: function(np.stack([part[metric] for part in parts]))
            for metric in parts[0]
            if all(metric in part for part in parts)
        }


def _difference(pair: np.ndarray) -> np.ndarray:
    return pair[0] - pair[1]


def _estimates(rows: _TestRows, metric: str, values: np.ndarray, group: str) -> np.ndarray:
    """Return [1 + resamples]: the metric on the group's rows, then on every resample of them."""
    chosen, draws = rows.groups[group], rows.draws[group]
    sizes = rows.num_tokens[chosen] if metric == "response_loss" else np.ones(len(chosen))
    with np.errstate(invalid="ignore", over="ignore"):
        return (draws @ values[chosen]) / (draws @ sizes)


def _measure(rows: _TestRows, scores: Scores) -> dict[str, Any]:
    measured: dict[str, Any] = {}
    confidence: dict[str, dict[str, list[float]]] = {}
    for metric, values in scores.items():
        measured[metric], confidence[metric] = {}, {}
        for group, positions in rows.groups.items():
            estimates = _estimates(rows, metric, values, group)
            measured[metric][group] = float(estimates[0]) if np.isfinite(estimates[0]) else None
            if len(positions) > 1 and np.isfinite(estimates).all():
                confidence[metric][group] = _interval(estimates[1:])
    return {**measured, "confidence": confidence}


def _interval(resampled: np.ndarray) -> list[float]:
    return [float(bound) for bound in np.percentile(resampled, [2.5, 97.5])]


def _gap_closed(rows: _TestRows, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """Return what federated tuning closes of the loss gap between local-only and centralised training."""
    unknown = {"gap_closed": None, "gap_closed_confidence": None}
    missing = [name for name in ("local", "central", "federated") if name not in scores]
    if missing:
        return {**unknown, "gap_closed_reason": f"not evaluated: {', '.join(missing)}"}
    local, central, federated = (
        _estimates(rows, "response_loss", scores[name]["response_loss"], "all")
        for name in ("local", "central", "federated")
    )
    with np.errstate(invalid="ignore"):
        gap = local - central
    if not np.isfinite([local[0], central[0], federated[0]]).all():
        return {**unknown, "gap_closed_reason": "a loss is not finite: the model diverged"}
    if gap[0] <= 0:
        return {**unknown, "gap_closed_reason": "centralised training is no better than local-only training"}
    interval = _interval(((local - federated) / gap)[1:]) if len(rows.num_tokens) > 1 and (gap > 0).all() else None
    return {
        "gap_closed": float((local[0] - federated[0]) / gap[0]),
        "gap_closed_confidence": interval,
        "gap_closed_reason": None,
    }


def _worst_clients(per_client: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Return the client whose model has the highest loss, and the mean over the worst tenth (rounded up)."""

    def loss(client: str) -> float:
        value = per_client[client]["response_loss"]["all"]
        return np.inf if value is None else value

    def mean(clients: Sequence[str]) -> dict[str, float | None]:
        metrics = [metric for metric in ("response_loss", "exact_match", "rouge_l") if metric in per_client[clients[0]]]
        values = {metric: [per_client[client].get(metric, {}).get("all") for client in clients] for metric in metrics}
        return {metric: None if None in found else float(np.mean(found)) for metric, found in values.items()}

    worst_first = sorted(per_client, key=loss, reverse=True)
    tenth = worst_first[: -(-len(worst_first) // 10)]
    return {
        "worst_client": {"client": worst_first[0], **mean(worst_first[:1])},
        "worst_tenth": {"clients": tenth, **mean(tenth)},
    }
