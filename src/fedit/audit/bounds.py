"""What right guesses prove: lower bounds of epsilon from one run (2305.08846), exact intervals of shares, and AUCs.

One run, m canaries, each included by its own fair coin. Of these bits somebody who sees the outcome guesses r and
abstains from the rest. If what was run is (epsilon, delta)-private, each guess is right with probability
e^epsilon / (1 + e^epsilon) at most, whatever the others were, but for delta: with W ~ Binomial(r, that), v or more of
them are right with probability at most

    P[W >= v] + 2 m delta max_{1 <= i <= v} P[v > W >= v - i] / i           (Theorem 5.2)

An epsilon that makes what happened less likely than 5% is refuted. Without delta and abstention it is the lower end of
Clopper and Pearson's interval of the share of right guesses, as an epsilon.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

CONFIDENCE = 0.95
GUESSED_SHARES = (1 / 64, 1 / 16, 1 / 4, 1.0)
"""Of the canaries: who is sure of few proves a large epsilon by these, who errs often does better with all."""
LARGEST_EPSILON = 50.0


@dataclass(frozen=True)
class EmpiricalEpsilon:
    """A lower bound of epsilon, and the guesses that prove it."""

    epsilon: float
    """Holds with `CONFIDENCE`; 0: nothing is proven."""
    delta: float
    num_canaries: int
    num_guesses: int
    num_right: int


def empirical_epsilon(
    adversaries: Sequence[np.ndarray], included: np.ndarray, delta: float, confidence: float = CONFIDENCE
) -> EmpiricalEpsilon:
    """Return the best lower bound that any of several adversaries gets.

    Each is its scores [m], higher where a canary rather was `included` (bool [m]). It guesses "in" of the highest and
    "out" of the lowest, as many of either. All adversaries and numbers of guesses are tried, so that each has to hold
    with its part of what is left to chance.
    """
    num = len(included)
    sizes = sorted({max(1, round(share * num / 2)) for share in GUESSED_SHARES if share * num >= 2})
    tries = [(scores, size) for scores in adversaries for size in sizes]
    best = EmpiricalEpsilon(0.0, delta, num, 0, 0)
    for scores, size in tries:
        order = np.argsort(scores, kind="stable")
        right = int((~included[order[:size]]).sum() + included[order[num - size :]].sum())
        guesses = 2 * size
        epsilon = epsilon_lower_bound(num, guesses, right, delta, 1 - (1 - confidence) / len(tries))
        if epsilon > best.epsilon:
            best = EmpiricalEpsilon(epsilon, delta, num, guesses, right)
    return best


def epsilon_lower_bound(
    num_canaries: int, num_guesses: int, num_right: int, delta: float = 0.0, confidence: float = CONFIDENCE
) -> float:
    """Return the largest epsilon that `num_right` of `num_guesses` refute; 0 where they refute none."""
    refuted = lambda epsilon: p_value(num_canaries, num_guesses, num_right, epsilon, delta) <= 1 - confidence
    return _last(refuted, 0.0, LARGEST_EPSILON)


def p_value(num_canaries: int, num_guesses: int, num_right: int, epsilon: float, delta: float = 0.0) -> float:
    """Return at most how likely so many right guesses are under (epsilon, delta)-differential privacy."""
    assert 0 <= num_right <= num_guesses <= num_canaries
    log_pmf = _log_binomial(num_guesses, epsilon)
    tail = float(np.exp(log_pmf[num_right:]).sum())
    if not delta or not num_right:
        return min(1.0, tail)
    below = np.cumsum(np.exp(log_pmf[:num_right])[::-1]) / np.arange(1, num_right + 1)
    return min(1.0, tail + 2 * num_canaries * delta * float(below.max()))


def share_interval(hits: int, total: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Clopper and Pearson's exact interval of a share."""
    half = (1 - confidence) / 2
    tail = lambda share, start: float(np.exp(_log_pmf(total, share)[start:]).sum())
    low = _last(lambda share: tail(share, hits) <= half, 0.0, 1.0) if hits else 0.0
    high = 1 - _last(lambda other: tail(other, total - hits) <= half, 0.0, 1.0) if hits < total else 1.0
    return low, high


def calibrated(scores: np.ndarray, *about: np.ndarray) -> np.ndarray:
    """Return what of the scores [..., m] does not follow from what is known `about` each of them, by least squares, in
    standard deviations: training lowers the loss of a hard row more, whether or not it was trained on.
    """
    known = np.stack([np.ones(scores.shape[-1]), *about], axis=1)
    rest = scores - known @ np.linalg.lstsq(known, scores, rcond=None)[0]
    return rest / max(float(rest.std()), 1e-30)


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Return how often a member's score is the higher one of a pair; a tie counts half."""
    ordered = np.sort(others)
    wins = np.searchsorted(ordered, members, "left") + np.searchsorted(ordered, members, "right")
    return float(wins.mean() / (2 * len(others)))


def bootstrap_interval(
    statistic: Callable[[np.ndarray, np.ndarray], float],
    members: np.ndarray,
    others: np.ndarray,
    rng: np.random.Generator,
    resamples: int = 1000,
) -> tuple[float, float]:
    """Return the 95% percentile bootstrap interval of a statistic such as the AUC, over members and others."""
    draws = [statistic(rng.choice(members, len(members)), rng.choice(others, len(others))) for _ in range(resamples)]
    low, high = np.quantile(draws, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def hits_at(members: np.ndarray, others: np.ndarray, false_share: float = 0.01) -> int:
    """Return how many members score higher than all but `false_share` of the others."""
    threshold = np.sort(others)[::-1][math.floor(false_share * len(others))]
    return int((members > threshold).sum())


def _last(holds: Callable[[float], bool], low: float, high: float) -> float:
    """Return where `holds` ends, by bisection: it holds up to some place between `low` and `high`; `low` if nowhere."""
    if not holds(low):
        return low
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


def _log_binomial(trials: int, epsilon: float) -> np.ndarray:
    """Return the log-probabilities of Binomial(trials, e^epsilon / (1 + e^epsilon)), [trials + 1]."""
    log_right, log_wrong = -math.log1p(math.exp(-epsilon)), -epsilon - math.log1p(math.exp(-epsilon))
    right = np.arange(trials + 1)
    return _log_choose(trials) + right * log_right + (trials - right) * log_wrong


def _log_pmf(trials: int, share: float) -> np.ndarray:
    """Return the log-probabilities of Binomial(trials, share), [trials + 1]."""
    hits = np.arange(trials + 1)
    if share in {0.0, 1.0}:
        return np.where(hits == share * trials, 0.0, -np.inf)
    return _log_choose(trials) + hits * math.log(share) + (trials - hits) * math.log1p(-share)


@functools.cache
def _log_choose(trials: int) -> np.ndarray:
    """Return the logarithms of the binomial coefficients, [trials + 1]."""
    factorials = np.asarray([math.lgamma(k + 1) for k in range(trials + 1)])
    return factorials[-1] - factorials - factorials[::-1]
