"""Rows of several clients as one input of the base: packed into one sequence where it can take that, else padded.

A packed batch has the tokens of all rows one after the other, sorted by slot. Only the end of each slot's run is filled
up, to a whole number of pieces: every piece of tokens has one adapter, so that the products of all adapters are one
batched product over pieces. In a padded batch a piece is a row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedit.attention import NAME, PackedRows, as_mask
from fedit.grouping import group_by_length, group_by_slot
from fedit.interfaces import EncodedExample, EngineError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH_TOKENS = {"cpu": 4096, "cuda": 16384}
"""Tokens of a batch, about at most (one row may be longer): more would gain nothing."""
LAUNCH_TOKENS = {"cpu": 192, "cuda": 2048}
"""What another padded batch costs, in tokens: rows are padded rather than split off where that is cheaper."""
PIECES = (256, 128, 64, 32, 16, 8)
"""Tokens of a piece of a packed batch: the longest that leaves `MAX_FILL` of the tokens unused, or the shortest."""
MAX_FILL = 0.04


@dataclass(frozen=True, eq=False)
class Batch:
    """The input of one forward pass. "Token number" below means a place in ``input_ids`` seen as one sequence."""

    input_ids: Tensor
    """int64 [1, N] packed, or [R, T] padded on the right: under causal attention nothing sees what lies to its right"""
    position_ids: Tensor | None
    """int64 [1, N] where packed: the place of each token in its row"""
    attention_mask: Tensor | None
    """Where packed: which tokens form a row"""
    rows: Sequence[tuple[int, int]]
    """The first token number of each row and its length, in the order of the rows given"""
    piece_slots: Sequence[int]
    """The adapter of each piece; all pieces have the same number of tokens"""
    predicting: Tensor
    """int64 [P]: numbers of the tokens whose successor is supervised, row by row"""
    targets: Tensor
    """int64 [P]: these successors"""
    target_rows: Tensor
    """int64 [P]: the row of each"""
    dropout_seeds: Sequence[int]
    """One per row, where adapter dropout applies"""

    @staticmethod
    def pack(
        examples: Sequence[EncodedExample], slots: Sequence[int], device: torch.device, seeds: Sequence[int] = ()
    ) -> Batch:
        """Return the packed batch of `examples`, the i-th under the adapter ``slots[i]``."""
        lengths = np.asarray([len(example) for example in examples])
        order = np.argsort(slots, kind="stable")
        distinct, of_row = np.unique(slots, return_inverse=True)
        runs = np.bincount(of_row, weights=lengths).astype(int)
        piece = next((size for size in PIECES if (-runs % size).sum() <= MAX_FILL * runs.sum()), PIECES[-1])
        filled = runs + -runs % piece
        starts = np.zeros(len(examples), dtype=int)
        starts[order] = np.cumsum(lengths[order]) - lengths[order]
        starts += (np.cumsum(filled - runs) - (filled - runs))[of_row]
        positions = np.zeros(filled.sum(), dtype=np.int64)
        for start, length in zip(starts, lengths, strict=True):
            positions[start : start + length] = np.arange(length)
        return _batch(
            examples,
            starts,
            (1, len(positions)),
            np.repeat(distinct, filled // piece).tolist(),
            device,
            seeds,
            torch.from_numpy(positions[None]).to(device),
            as_mask(PackedRows(starts.tolist(), lengths.tolist(), len(positions), device)),
        )

    @staticmethod
    def pad(
        examples: Sequence[EncodedExample], slots: Sequence[int], device: torch.device, seeds: Sequence[int] = ()
    ) -> Batch:
        """Return the padded batch of `examples`, the i-th under the adapter ``slots[i]``."""
        length = max(len(example) for example in examples)
        starts = np.arange(len(examples)) * length
        return _batch(examples, starts, (len(examples), length), slots, device, seeds)


def _batch(
    examples: Sequence[EncodedExample],
    starts: np.ndarray,
    shape: tuple[int, int],
    piece_slots: Sequence[int],
    device: torch.device,
    seeds: Sequence[int],
    position_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
) -> Batch:
    input_ids = np.zeros(shape[0] * shape[1], dtype=np.int64)
    predicting, targets, target_rows = [], [], []
    for row, (start, example) in enumerate(zip(starts, examples, strict=True)):
        input_ids[start : start + len(example)] = example.input_ids
        supervised = np.flatnonzero(example.supervised[1:])
        predicting.append(start + supervised)
        targets.append(example.input_ids[1:][supervised].astype(np.int64))
        target_rows.append(np.full(len(supervised), row))
    of_tokens = [torch.from_numpy(np.concatenate(parts)).to(device) for parts in (predicting, targets, target_rows)]
    return Batch(
        torch.from_numpy(input_ids.reshape(shape)).to(device),
        position_ids,
        attention_mask,
        [(int(start), len(example)) for start, example in zip(starts, examples, strict=True)],
        piece_slots,
        *of_tokens,
        dropout_seeds=seeds,
    )


def batches(
    examples: Sequence[EncodedExample],
    slots: Sequence[int],
    device: torch.device,
    longest_packed: float,
    limit: int,
    seeds: Sequence[int] = (),
) -> Iterator[tuple[list[int], Batch]]:
    """Yield the rows' indices and the batch of each part of `examples` that goes through the base at once.

    A batch has about `limit` tokens at most. They are packed if no row is longer than `longest_packed`.
    """
    lengths = [len(example) for example in examples]
    if max(lengths) <= longest_packed:
        make, parts = Batch.pack, group_by_slot(lengths, slots, limit)
    else:
        launch = LAUNCH_TOKENS.get(device.type, LAUNCH_TOKENS["cuda"])
        make, parts = Batch.pad, group_by_length(lengths, limit, launch)
    for part in parts:
        part_seeds = [seeds[i] for i in part] if seeds else ()
        yield part, make([examples[i] for i in part], [slots[i] for i in part], device, part_seeds)


@torch.inference_mode()
def longest_packed(base: PreTrainedModel) -> float:
    """Return the tokens of the longest rows that `base` may be given packed, 0 if none, infinity if all.

    Found out by a small packed batch, because architectures differ in what they take over from token to token: a row's
    logits must not depend on the row in front of it to the last bit, and be those of the row alone.
    """
    if base.config._attn_implementation != NAME:
        return 0
    first, other, row = (2, 3, 4), (6, 2, 9), (5, 3, 7, 8)

    def logits(*rows: Sequence[int]) -> Tensor:
        """Of the last row."""
        ids = np.concatenate(rows)[None] % base.config.vocab_size
        lengths = [len(row) for row in rows]
        positions = np.concatenate([np.arange(length) for length in lengths])[None]
        packed_rows = PackedRows((np.cumsum(lengths) - lengths).tolist(), lengths, sum(lengths), base.device)
        return base(
            input_ids=torch.from_numpy(ids).to(base.device),
            position_ids=torch.from_numpy(positions).to(base.device),
            attention_mask=as_mask(packed_rows),
            use_cache=False,
        ).logits[0, -len(row) :]

    try:
        packed, also_packed = logits(first, row), logits(other, row)
    except (EngineError, RuntimeError, TypeError, ValueError, IndexError):
        # It asks its attention for more, takes no positions, or computes with the mask: whatever it is, it is padded.
        return 0
    ids = torch.tensor([row], device=base.device) % base.config.vocab_size
    alone = base(input_ids=ids, use_cache=False).logits[0]
    same = torch.equal(packed, also_packed) and (packed - alone).norm() <= 0.05 * alone.norm()
    config = base.config.get_text_config()
    windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window is not None), default=math.inf) if same else 0
