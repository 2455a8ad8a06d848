"""Scores of a judge -> what is reported: relative scores, grades, wins, agreement, with bootstrap intervals. Pure.

A question counts where all its replies gave scores; the others are counted and left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from fedit.interfaces import derive_rng

NUM_RESAMPLES = 1000

Scores = tuple[float, ...] | None
"""What a reply gave; None: it could not be read, or there is none"""


def summarise_pairs(
    pairs: Sequence[Sequence[Scores]], categories: Sequence[str], seed: int = 0, *, by_category: bool = True
) -> dict[str, Any]:
    """Return how one model's answers score beside another's.

    ``relative_score`` is the sum of its scores over the sum of the other's, each question's being the mean over the
    orders in which the two answers were shown; ``confidence`` a 95% percentile bootstrap over questions;
    ``orders_agree`` the share of questions with the same winner (or tie) in every order; ``first_minus_second`` how
    many points an answer gets, on average, for being shown first.

    Args:
        pairs: by question and order, the scores of (this model, the other). In the first order this model's answer is
            shown first, in the second the other's.
        categories: of the questions.
        seed: of the bootstrap.
        by_category: whether each category is summarised, too.
    """
    counted = [index for index, orders in enumerate(pairs) if None not in orders]
    scores = np.array([pairs[index] for index in counted], dtype=np.float64).reshape(len(counted), len(pairs[0]), 2)
    means = scores.mean(axis=1)
    estimate, confidence = _ratio(means, seed)
    leads = np.sign(scores[:, :, 0] - scores[:, :, 1])
    verdicts = np.sign(means[:, 0] - means[:, 1])
    has_orders = scores.shape[1] > 1 and bool(counted)
    summary = {
        "relative_score": estimate,
        "confidence": confidence,
        "mean_scores": means.mean(axis=0).tolist() if counted else None,
        "wins": int((verdicts > 0).sum()),
        "ties": int((verdicts == 0).sum()),
        "losses": int((verdicts < 0).sum()),
        "orders_agree": float((leads == leads[:, :1]).all(axis=1).mean()) if has_orders else None,
        "first_minus_second": float((_gap(scores, 0) - _gap(scores, 1)).mean() / 2) if has_orders else None,
        "num_questions": len(counted),
        "num_left_out": len(pairs) - len(counted),
    }
    if by_category:
        summary["by_category"] = {
            category: summarise_pairs(
                [orders for orders, own in zip(pairs, categories, strict=True) if own == category],
                [category] * categories.count(category),
                seed,
                by_category=False,
            )
            for category in dict.fromkeys(categories)
        }
    return summary


def summarise_grades(grades: Sequence[Sequence[Scores]], seed: int = 0) -> dict[str, Any]:
    """Return the mean grade of a model over questions, and of each turn.

    Args:
        grades: by question and turn, one score.
        seed: of the bootstrap.
    """
    counted = [[scores[0] for scores in turns if scores is not None] for turns in grades if None not in turns]
    means = np.array([[np.mean(turns), 1.0] for turns in counted]).reshape(-1, 2)
    estimate, confidence = _ratio(means, seed)
    most = max((len(turns) for turns in counted), default=0)
    return {
        "grade": estimate,
        "confidence": confidence,
        "by_turn": [float(np.mean([turns[i] for turns in counted if len(turns) > i])) for i in range(most)],
        "num_questions": len(counted),
        "num_left_out": len(grades) - len(counted),
    }


def compare_grades(
    ours: Sequence[Sequence[Scores]], other: Sequence[Sequence[Scores]], seed: int = 0
) -> dict[str, Any]:
    """Return the mean difference of two models' grades of the same questions, with its interval, and who wins."""
    differences = [
        np.mean([a[0] - b[0] for a, b in zip(mine, others, strict=True) if a is not None and b is not None])
        for mine, others in zip(ours, other, strict=True)
        if None not in mine and None not in others
    ]
    rows = np.array([[difference, 1.0] for difference in differences]).reshape(-1, 2)
    estimate, confidence = _ratio(rows, seed)
    return {
        "difference": estimate,
        "confidence": confidence,
        "wins": int((rows[:, 0] > 0).sum()),
        "ties": int((rows[:, 0] == 0).sum()),
        "losses": int((rows[:, 0] < 0).sum()),
        "num_questions": len(rows),
        "num_left_out": len(ours) - len(rows),
    }


def _gap(scores: np.ndarray, order: int) -> np.ndarray:
    """Return how far this model's answer is ahead of the other's in one order, [questions]."""
    return scores[:, order, 0] - scores[:, order, 1]


def _ratio(rows: np.ndarray, seed: int) -> tuple[float | None, list[float] | None]:
    """Return the ratio of the two sums over rows [questions, 2], and its 95% interval; None where it is undefined."""
    num_rows = len(rows)
    if not num_rows:
        return None, None
    rng = derive_rng(seed, "judge")
    draws = rng.multinomial(num_rows, np.full(num_rows, 1 / num_rows), size=NUM_RESAMPLES)
    with np.errstate(divide="ignore", invalid="ignore"):
        above, below = (np.concatenate([np.ones((1, num_rows)), draws]) @ rows).T
        estimates = above / below
    if not np.isfinite(estimates[0]):
        return None, None
    if num_rows < 2 or not np.isfinite(estimates).all():
        return float(estimates[0]), None
    return float(estimates[0]), [float(bound) for bound in np.percentile(estimates[1:], [2.5, 97.5])]
