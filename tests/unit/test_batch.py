"""Packed and padded batches hold every token where they say, and pieces of one adapter each."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedit.base import load_base
from fedit.batch import MAX_FILL, PIECES, Batch, batches, longest_packed
from fedit.config import ModelConfig
from fedit.interfaces import EncodedExample, Example, Turn
from fedit.lora import Pieces

CPU = torch.device("cpu")


def make_row(length: int, seed: int) -> EncodedExample:
    rng = np.random.default_rng(seed)
    ids = rng.integers(3, 200, length).astype(np.int32)
    return EncodedExample(ids, rng.random(length) < 0.5, Example((Turn("", ""),)))


ROWS = st.lists(st.tuples(st.integers(2, 300), st.integers(0, 4)), min_size=1, max_size=30)


@given(ROWS, st.sampled_from([Batch.pack, Batch.pad]))
def test_tokens_stand_where_the_batch_says(rows: list[tuple[int, int]], collate) -> None:
    examples = [make_row(length, seed) for seed, (length, _) in enumerate(rows)]
    slots = [slot for _, slot in rows]
    batch = collate(examples, slots, CPU)
    ids = batch.input_ids.flatten().tolist()
    piece = len(ids) // len(batch.piece_slots)
    taken = set()
    for (start, length), example, slot in zip(batch.rows, examples, slots, strict=True):
        assert ids[start : start + length] == example.input_ids.tolist()
        assert {batch.piece_slots[token // piece] for token in range(start, start + length)} == {slot}
        taken |= set(range(start, start + length))
        if batch.position_ids is not None:
            assert batch.position_ids[0, start : start + length].tolist() == list(range(length))
    assert len(taken) == sum(length for length, _ in rows)
    expected = [
        (row, ids[start + i - 1], ids[start + i])
        for row, ((start, length), example) in enumerate(zip(batch.rows, examples, strict=True))
        for i in range(1, length)
        if example.supervised[i]
    ]
    predicted = [ids[token] for token in batch.predicting.tolist()]
    assert list(zip(batch.target_rows.tolist(), predicted, batch.targets.tolist(), strict=True)) == expected


@given(ROWS)
def test_packing_fills_up_no_more_than_it_must(rows: list[tuple[int, int]]) -> None:
    examples = [make_row(length, seed) for seed, (length, _) in enumerate(rows)]
    batch = Batch.pack(examples, [slot for _, slot in rows], CPU)
    real, processed = sum(length for length, _ in rows), batch.input_ids.numel()
    runs = len({slot for _, slot in rows})
    assert processed - real <= max(MAX_FILL * real, runs * (PIECES[-1] - 1))


def test_rows_of_dolly_s_lengths_are_hardly_padded() -> None:
    """Single rows of ten clients, the worst case of the recipes; lengths as in databricks-dolly-15k."""
    rng = np.random.default_rng(0)
    real = processed = 0
    for step in range(50):
        lengths = rng.lognormal(np.log(100), 0.7, 10).astype(int).clip(8, 512)
        examples = [make_row(length, step) for length in lengths]
        for _, batch in batches(examples, list(range(10)), CPU, np.inf, 4096):
            processed += batch.input_ids.numel()
        real += lengths.sum()
    assert real / processed > 0.95


def test_rows_longer_than_a_base_packs_are_padded() -> None:
    examples = [make_row(length, length) for length in (5, 90)]
    ((_, packed),) = batches(examples, [0, 1], CPU, 90, 4096)
    assert packed.position_ids is not None
    padded = list(batches(examples, [0, 1], CPU, 89, 4096))
    assert all(batch.position_ids is None for _, batch in padded)


def test_a_base_that_leaks_between_packed_rows_is_not_packed(tiny_model_folder: Path) -> None:
    base = load_base(ModelConfig(path=str(tiny_model_folder), dtype="float32"), CPU)
    assert longest_packed(base) == np.inf
    layer = base.get_submodule("model.layers.1")

    def mix(_module: torch.nn.Module, _inputs: object, output: torch.Tensor) -> torch.Tensor:
        return output + 1e-3 * output.roll(3, 1)

    handle = layer.register_forward_hook(mix)
    assert longest_packed(base) == 0
    handle.remove()
    assert longest_packed(base) == np.inf


@pytest.mark.parametrize("slots", [[0, 0, 2], [2, 0, 2, 1, 0], [3], [1, 1]])
def test_pieces_add_up_by_slot(slots: list[int]) -> None:
    """Many adapters or one; and what is not finite stays with its slot."""
    pieces = Pieces.of(slots, slots, 4, CPU)
    parts = torch.randn(len(slots), 2, 3, generator=torch.Generator().manual_seed(0))
    expected = torch.ones(4, 2, 3)
    for slot, part in zip(slots, parts, strict=True):
        expected[slot] += part

    def add(into: torch.Tensor) -> torch.Tensor:
        pieces.add(parts if pieces.only_slot is None else parts.sum(0), into)
        return into

    assert pieces.only_slot == (slots[0] if len(set(slots)) == 1 else None)
    torch.testing.assert_close(add(torch.ones(4, 2, 3)), expected)
    parts[0] = torch.nan
    assert [bool(slot.isnan().any()) for slot in add(torch.zeros(4, 2, 3))] == [k == slots[0] for k in range(4)]
