"""Who trains on what and when."""

from __future__ import annotations

import itertools

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fedit.bench import Workload, make_clients
from fedit.interfaces import Adapter, EncodedExample
from fedit.optimizer import _runs
from fedit.tuning import TuningTask, _Slot, _take_turn, batch_indices


def slots(clients: list[tuple[int, int]]) -> list[_Slot]:
    """Slots with a batch of so many tokens and so many steps to go."""
    example = make_clients(Workload(clients=1, rows=1, length=8, max_length=8), 100)[0][0]
    live = []
    for index, (tokens, steps) in enumerate(clients):
        task = TuningTask(str(index), [example], Adapter({}, 1, 1.0), 0, steps, steps, 0)
        ids = np.zeros(tokens, np.int32)
        live.append(_Slot(index, task, batch=[EncodedExample(ids, ids == 0, example.example)]))
    return live


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


@given(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 300))
def test_a_turn_is_as_full_as_it_can_be(clients: list[tuple[int, int]], limit: int) -> None:
    """Who has most steps left is in it; it keeps to the limit, or is one slot; nobody who would fit is left out."""
    live = slots(clients)
    turn = _take_turn(live, limit)
    total = sum(slot.batch_tokens for slot in turn)
    assert len({slot.index for slot in turn}) == len(turn)
    assert max(live, key=lambda slot: slot.steps_left).steps_left == turn[0].steps_left
    assert total <= limit or len(turn) == 1
    assert all(total + slot.batch_tokens > limit for slot in live if slot not in turn)


@given(st.lists(st.tuples(st.integers(1, 120), st.integers(1, 9)), min_size=1, max_size=12), st.integers(1, 300))
def test_every_slot_comes_to_its_end(clients: list[tuple[int, int]], limit: int) -> None:
    live, turns = slots(clients), 0
    while live:
        turns += 1
        for slot in _take_turn(live, limit):
            slot.step += 1
            if not slot.steps_left:
                live.remove(slot)
    assert turns <= sum(steps for _, steps in clients)


def test_the_longest_client_is_not_left_to_the_end() -> None:
    """Eight steps in a row are the least for it; the others' twelve ride along."""
    live, turns = slots([(50, 4), (50, 4), (50, 4), (50, 8)]), 0
    while live:
        turns += 1
        for slot in _take_turn(live, 150):
            slot.step += 1
            if not slot.steps_left:
                live.remove(slot)
    assert turns == 8


@given(st.sets(st.integers(0, 20), max_size=12))
def test_runs_cover_the_slots(chosen: set[int]) -> None:
    runs = _runs(sorted(chosen))
    assert [slot for run in runs for slot in range(run.start, run.stop)] == sorted(chosen)
    assert all(first.stop < second.start for first, second in itertools.pairwise(runs))
