"""The paired bootstrap: how far two models differ on the same test rows, and how sure that is.

The estimate. Seeds s = 1..S, each with two models and its own test rows (the same ones for both). With the score x of a
row (its loss summed over the response tokens, or 1 where its answer passes) and its size w (its response tokens, or 1),

    d_s = sum over rows of (x_one - x_other) / sum over rows of w,        D = mean over s of d_s.

The interval. Rows are drawn, with replacement, from all *different* rows that any seed has, as many as there are; a row
that is drawn comes with its scores in every seed that has it. So seeds that share a test set share each draw, which
leaves in what their rows have in common, seeds with test sets of their own are drawn independently, and what overlaps
is treated as what it is. D is computed from each of `NUM_RESAMPLES` draws (one that leaves a seed without rows is drawn
again); the interval is from the 2.5th to the 97.5th percentile. For one seed that is the bootstrap of
``evaluation.json``.

What it does not cover. The seeds are not drawn: two or three are too few for a bootstrap. What training with another
seed would change is in the standard deviation of d_s over the seeds, which stands beside the interval.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedit.comparison.measures import row_key
from fedit.evaluation.metrics import NUM_RESAMPLES
from fedit.interfaces import DataError, derive_rng
from fedit.report import RunFolder

SCORES = {"response_loss": "nll", "exact_match": "passed", "rouge_l": "rouge_l"}
"""By metric, the field of ``answers.jsonl`` that has a row's score."""


@dataclass(frozen=True, eq=False)
class Answers:
    """The scores of a run's models on its test rows."""

    rows: Sequence[bytes]
    """What makes each row the row that it is [N]"""
    num_tokens: np.ndarray
    """Response tokens, float64 [N]"""
    scores: Mapping[str, Mapping[str, np.ndarray]]
    """By model (of clients' models their mean) and metric, float64 [N]; metrics that a model has not are left out"""


@dataclass(frozen=True, eq=False)
class Pair:
    """Two models of one seed on the same rows."""

    rows: Sequence[bytes]
    """[N]"""
    differences: np.ndarray
    """Scores of the one minus those of the other, float64 [N]"""
    sizes: np.ndarray
    """float64 [N]"""

    @property
    def difference(self) -> float:
        return float(self.differences.sum() / self.sizes.sum())


def read_answers(run: RunFolder) -> Answers | None:
    """Return the scores of ``answers.jsonl``; None: the run has none.

    Raises:
        DataError: a model did not answer the rows of the first.
    """
    rows: list[bytes] = []
    num_tokens = np.zeros(0)
    models: dict[str, list[dict[str, np.ndarray]]] = {}
    for model, lines in itertools.groupby(run.answers(), lambda line: line["model"]):
        answers = list(lines)
        if not rows:
            rows = [row_key(line) for line in answers]
            num_tokens = np.array([line["num_tokens"] for line in answers], dtype=np.float64)
        if [row_key(line) for line in answers] != rows:
            raise DataError(f"{run.path / 'answers.jsonl'} is damaged: {model} did not answer the rows of the others.")
        columns = {metric: [line[field] for line in answers] for metric, field in SCORES.items()}
        scores = {metric: np.array(column, float) for metric, column in columns.items() if None not in column}
        models.setdefault(model.partition("/")[0], []).append(scores)
    means = {
        kind: {metric: np.mean([own[metric] for own in each], axis=0) for metric in each[0]}
        for kind, each in models.items()
    }
    return Answers(rows, num_tokens, means) if rows else None


def paired_interval(pairs: Sequence[Pair]) -> list[float] | None:
    """Return the 95% interval of the mean difference; None: there is one row alone, or a score is not finite."""
    places = {row: index for index, row in enumerate(dict.fromkeys(row for pair in pairs for row in pair.rows))}
    num_rows = len(places)
    tops, bottoms = np.zeros((2, len(pairs), num_rows))
    for seed, pair in enumerate(pairs):
        columns = [places[row] for row in pair.rows]
        np.add.at(tops[seed], columns, pair.differences)
        np.add.at(bottoms[seed], columns, pair.sizes)
    if num_rows < 2 or not np.isfinite(tops).all():
        return None
    has_row = bottoms > 0
    draws = _draws(has_row.tobytes(), len(pairs))
    estimates = ((draws @ tops.T) / (draws @ bottoms.T)).mean(axis=1)
    return [float(bound) for bound in np.percentile(estimates, [2.5, 97.5])]


@functools.lru_cache(maxsize=4)  # the metrics and groups of a comparison mostly share their rows
def _draws(which: bytes, num_seeds: int) -> np.ndarray:
    """Return [resamples, rows]: how often each row counts, where the bools [seeds, rows] in `which` say which seed has
    which row.
    """
    has_row = np.frombuffer(which, dtype=bool).reshape(num_seeds, -1)
    rng = derive_rng(0, "bootstrap", "comparison")
    num_rows = has_row.shape[1]
    draws = np.zeros((NUM_RESAMPLES, num_rows))
    missing = np.ones(NUM_RESAMPLES, dtype=bool)
    while missing.any():
        draws[missing] = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=int(missing.sum()))
        missing = ~(draws @ has_row.T > 0).all(axis=1)
    return draws
