"""Batches: who trains on what and when, and how rows are grouped."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedit.tuning import LAUNCH_TOKENS, MICRO_BATCH_TOKENS, batch_indices, group_by_length


@given(st.integers(1, 50), st.integers(1, 12), st.integers(0, 5))
def test_every_pass_sees_every_row_once(num_examples: int, batch_size: int, pass_index: int) -> None:
    steps = -(-num_examples // batch_size)
    seen = [batch_indices(num_examples, batch_size, pass_index * steps + step, seed=3) for step in range(steps)]
    assert sorted(np.concatenate(seen)) == list(range(num_examples))


def test_passes_and_clients_differ_in_order() -> None:
    first, second = (np.concatenate([batch_indices(40, 8, step + start, 3) for step in range(5)]) for start in (0, 5))
    other = np.concatenate([batch_indices(40, 8, step, 4) for step in range(5)])
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, other)


def test_rounds_go_on_where_the_last_one_stopped() -> None:
    """10 rounds of 2 steps of 4 rows see all 80 rows: no round starts again with the same rows."""
    seen = np.concatenate(
        [batch_indices(80, 4, round_index * 2 + step, 7) for round_index in range(10) for step in (0, 1)]
    )
    assert sorted(seen) == list(range(80))


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60))
def test_grouping_keeps_every_row_and_the_budget(lengths: list[int]) -> None:
    groups = group_by_length(lengths, "cpu")
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= MICRO_BATCH_TOKENS["cpu"]


def cost(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[i] for i in group) + LAUNCH_TOKENS["cpu"] for group in groups)


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=9))
def test_grouping_is_the_cheapest(lengths: list[int]) -> None:
    """Against every way to cut the sorted rows."""
    order = np.argsort(lengths, kind="stable").tolist()
    costs = []
    for cuts in range(2 ** (len(order) - 1)):
        borders = [0, *(i + 1 for i in range(len(order) - 1) if cuts >> i & 1), len(order)]
        groups = [order[start:end] for start, end in pairwise(borders)]
        if all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= MICRO_BATCH_TOKENS["cpu"] for g in groups):
            costs.append(cost(lengths, groups))
    assert cost(lengths, group_by_length(lengths, "cpu")) == min(costs)


def test_ragged_rows_are_hardly_padded() -> None:
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 80).astype(int).clip(10, 512).tolist()
    padded = sum(len(group) * max(lengths[i] for i in group) for group in group_by_length(lengths, "cpu"))
    assert sum(lengths) / padded > 0.85
    assert sum(lengths) / (len(lengths) * max(lengths)) < 0.4
