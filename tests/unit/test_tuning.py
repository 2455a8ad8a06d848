"""Who trains on what and when."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedit.tuning import batch_indices


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
