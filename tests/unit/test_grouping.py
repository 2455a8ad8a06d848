"""Which rows go through the base together."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedit.grouping import group_by_length, group_by_slot

LIMIT, LAUNCH = 4096, 192


@given(st.lists(st.integers(1, 600), min_size=1, max_size=60))
def test_grouping_keeps_every_row_and_the_budget(lengths: list[int]) -> None:
    groups = group_by_length(lengths, LIMIT, LAUNCH)
    assert sorted(index for group in groups for index in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) == 1 or len(group) * max(lengths[i] for i in group) <= LIMIT


def cost(lengths: list[int], groups: list[list[int]]) -> int:
    return sum(len(group) * max(lengths[i] for i in group) + LAUNCH for group in groups)


@given(st.lists(st.integers(1, 1500), min_size=1, max_size=9))
def test_grouping_is_the_cheapest(lengths: list[int]) -> None:
    """Against every way to cut the sorted rows."""
    order = np.argsort(lengths, kind="stable").tolist()
    costs = []
    for cuts in range(2 ** (len(order) - 1)):
        borders = [0, *(i + 1 for i in range(len(order) - 1) if cuts >> i & 1), len(order)]
        groups = [order[start:end] for start, end in pairwise(borders)]
        if all(len(g) == 1 or len(g) * max(lengths[i] for i in g) <= LIMIT for g in groups):
            costs.append(cost(lengths, groups))
    assert cost(lengths, group_by_length(lengths, LIMIT, LAUNCH)) == min(costs)


def test_ragged_rows_are_hardly_padded() -> None:
    lengths = np.random.default_rng(0).lognormal(4.6, 0.8, 80).astype(int).clip(10, 512).tolist()
    padded = sum(len(group) * max(lengths[i] for i in group) for group in group_by_length(lengths, LIMIT, LAUNCH))
    assert sum(lengths) / padded > 0.85
    assert sum(lengths) / (len(lengths) * max(lengths)) < 0.4


@given(st.lists(st.tuples(st.integers(1, 600), st.integers(0, 5)), min_size=1, max_size=80))
def test_grouping_by_slot_shares_the_tokens_out(rows: list[tuple[int, int]]) -> None:
    lengths, slots = (list(column) for column in zip(*rows, strict=True))
    groups = group_by_slot(lengths, slots, LIMIT)
    order = [index for group in groups for index in group]
    assert sorted(order) == list(range(len(rows)))
    assert [slots[index] for index in order] == sorted(slots)
    for group in groups:
        assert sum(lengths[index] for index in group) <= LIMIT + max(lengths)
