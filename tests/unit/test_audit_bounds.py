"""What right guesses prove, against brute force, exact intervals and randomized response."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from fedit.audit.bounds import (
    auc,
    bootstrap_interval,
    empirical_epsilon,
    epsilon_lower_bound,
    hits_at,
    p_value,
    share_interval,
)


@pytest.mark.parametrize(("total", "right"), [(10, 10), (100, 80), (1000, 900), (50, 25)])
def test_without_delta_it_is_clopper_and_pearsons_bound(total: int, right: int) -> None:
    share = stats.beta.ppf(0.05, right, total - right + 1)
    expected = max(0.0, math.log(share / (1 - share)))
    assert epsilon_lower_bound(total, total, right) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("hits", [0, 1, 7, 20])
def test_intervals_of_shares_are_exact(hits: int) -> None:
    low, high = stats.binomtest(hits, 20).proportion_ci(0.95, method="exact")
    assert share_interval(hits, 20) == pytest.approx((low, high), abs=1e-9)


def test_the_p_value_with_delta_by_hand() -> None:
    """r = 2 guesses, both right, of m = 3, epsilon = log 3: guesses are right with 3/4, W = 0, 1, 2 with 1, 6, 9
    sixteenths. P[W >= 2] = 9/16; the largest of (6/16) / 1 and (7/16) / 2 is 6/16.
    """
    assert p_value(3, 2, 2, math.log(3), 0.01) == pytest.approx(9 / 16 + 2 * 3 * 0.01 * 6 / 16)


def test_the_p_value_bounds_what_a_leak_with_probability_delta_does() -> None:
    """Each canary's bit is told with probability delta, and randomized response otherwise: (epsilon, delta) exactly."""
    epsilon, delta, num = 1.0, 0.05, 6
    right = delta + (1 - delta) / (1 + math.exp(-epsilon))
    for hits in range(num + 1):
        true = sum(
            math.prod(right if each else 1 - right for each in outcome)
            for outcome in itertools.product((0, 1), repeat=num)
            if sum(outcome) >= hits
        )
        assert true <= p_value(num, num, hits, epsilon, delta) + 1e-12


@pytest.mark.parametrize("epsilon", [0.0, 0.5, 2.0, 4.0])
def test_randomized_response_is_hardly_ever_exceeded_and_nearly_reached(epsilon: float) -> None:
    rng = np.random.default_rng(0)
    bounds = []
    for _ in range(400):
        included = rng.random(2000) < 0.5
        truth = rng.random(2000) < 1 / (1 + math.exp(-epsilon))
        answers = np.where(truth, included, ~included) + rng.random(2000) / 10
        bounds.append(empirical_epsilon([answers], included, 0.0).epsilon)
    assert np.mean(np.asarray(bounds) > epsilon) <= 0.07
    assert np.median(bounds) >= 0.75 * epsilon - 0.05


def test_a_second_adversary_costs_some_confidence_and_no_more() -> None:
    rng = np.random.default_rng(1)
    included = rng.random(1000) < 0.5
    good = included + rng.normal(0, 0.3, 1000)
    alone = empirical_epsilon([good], included, 1e-6)
    with_noise = empirical_epsilon([rng.normal(0, 1, 1000), good], included, 1e-6)
    assert 0.9 * alone.epsilon < with_noise.epsilon < alone.epsilon
    assert (alone.num_guesses, alone.num_right) == (with_noise.num_guesses, with_noise.num_right)


def test_scores_that_know_nothing_prove_nothing() -> None:
    rng = np.random.default_rng(2)
    proven = [empirical_epsilon([rng.random(500)], rng.random(500) < 0.5, 1e-6).epsilon for _ in range(200)]
    assert np.mean(np.asarray(proven) > 0) <= 0.07


def test_auc_counts_pairs() -> None:
    members, others = np.array([3.0, 1.0, 1.0]), np.array([0.0, 1.0])
    assert auc(members, others) == pytest.approx((2 + 1.5 + 1.5) / 6)
    rng = np.random.default_rng(0)
    low, high = bootstrap_interval(auc, rng.normal(1, 1, 200), rng.normal(0, 1, 200), rng)
    assert low < stats.norm.cdf(1 / math.sqrt(2)) < high
    assert high - low < 0.12


def test_hits_at_a_share_of_false_alarms() -> None:
    others = np.arange(200.0)
    assert hits_at(np.array([196.0, 197.0, 198.0, 500.0]), others, 0.01) == 2  # two others, of 198 and 199, are above


def test_the_interval_of_the_members_found_knows_that_the_threshold_is_estimated() -> None:
    """Of 200 others it is the third largest: Clopper and Pearson's interval takes it as known."""
    rng = np.random.default_rng(0)
    members, others = rng.normal(1, 1, 200), rng.normal(0, 1, 200)
    share = lambda found, false: hits_at(found, false) / len(found)
    low, high = bootstrap_interval(share, members, others, rng)
    exact = share_interval(hits_at(members, others), 200)
    assert low < share(members, others) < high
    assert high - low > 1.5 * (exact[1] - exact[0])
