"""Which rows go through the base, or through its attention, together."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def group_by_length(lengths: Sequence[int], limit: int, launch: int) -> list[list[int]]:
    """Cut the rows, sorted by length, into groups of the least total cost; return their row indices.

    A group's cost is its tokens, padded to the longest row, plus `launch`: what another group costs, in tokens. It has
    `limit` padded tokens at most, or is one row. The best cuts are found by dynamic programming over the sorted rows.
    """
    order = np.argsort(np.asarray(lengths), kind="stable")
    sorted_lengths = np.asarray(lengths)[order]
    best, start_of = np.zeros(len(order) + 1), np.zeros(len(order) + 1, dtype=int)
    for end in range(1, len(order) + 1):
        longest = int(sorted_lengths[end - 1])
        first = max(0, end - max(1, limit // longest))
        starts = np.arange(first, end)
        costs = best[first:end] + (end - starts) * longest + launch
        choice = int(np.argmin(costs))
        best[end], start_of[end] = costs[choice], starts[choice]
    groups, end = [], len(order)
    while end > 0:
        groups.append(order[start_of[end] : end].tolist())
        end = start_of[end]
    return groups[::-1]


def group_by_slot(lengths: Sequence[int], slots: Sequence[int], limit: int) -> list[list[int]]:
    """Cut the rows, sorted by slot, into the fewest groups of about the same number of tokens, `limit` or little more.

    Returns their row indices.
    """
    order = np.lexsort((np.asarray(lengths), np.asarray(slots)))
    # A row belongs where its middle token falls when the tokens of all rows are shared out evenly.
    ends = np.cumsum(np.asarray(lengths)[order])
    middles = ends - np.asarray(lengths)[order] / 2
    num_groups = -(-int(ends[-1]) // limit)
    group_of = (middles * num_groups / ends[-1]).astype(int)
    return [order[group_of == group].tolist() for group in np.unique(group_of)]
