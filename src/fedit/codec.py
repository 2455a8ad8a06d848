"""Compressed messages: which numbers of an update travel, in how many bits, and what is made up for later.

A codec is a mask (the positions that are sent), a quantizer (the bits of each number) and error feedback: what a sender
left out or rounded is added to its next update, so that nothing is lost, only late (1901.09847). Both sides know the
names and shapes of what travels; the message holds the numbers alone:

    [rank bitmap, or count, or nothing] [Rice-coded positions] [a bfloat16 scale for every 256 numbers] [codes, packed]
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from fedit.adapter import FACTORS, factor_of
from fedit.interfaces import RoundError, derive_rng

if TYPE_CHECKING:
    from fedit.config import CodecConfig, RunConfig

GROUP = 256
"""Neighbours among the sent numbers that share a scale."""
Message = bytes | bytearray | memoryview
BITS = {"int8": 8, "int4": 4, "2-bit": 2, "sign": 1}


@dataclass(frozen=True, eq=False)
class Sent:
    """A message, and both ends of it."""

    message: bytes
    received: Mapping[str, Tensor]
    """What the receiver makes of it, float32"""
    error: Mapping[str, Tensor]
    """What it does not hold of all that was to be sent; empty without error feedback"""


def upload_codec(config: RunConfig) -> Codec:
    """Return the codec of clients' updates."""
    feedback = config.upload.feeds_back(config.aggregation)
    rule = config.aggregation
    return Codec(config.upload, config.seed, "up", feedback=feedback, ranks_kept=rule.ranks_kept, sparse=rule.sparse)


def download_codec(config: RunConfig) -> Codec:
    """Return the codec of the global adapter's steps."""
    feedback = config.download.feeds_back(config.aggregation)
    return Codec(config.download, config.seed, "down", feedback=feedback, sparse=config.aggregation.sparse)


class Codec:
    """One direction of a run's messages."""

    def __init__(
        self,
        config: CodecConfig,
        seed: int,
        direction: str,
        *,
        feedback: bool,
        ranks_kept: float = 1.0,
        sparse: bool = False,
    ) -> None:
        self._config = config
        self._seed = seed
        self._direction = direction
        self._feedback = feedback
        self._ranks_kept = ranks_kept
        self._sparse = sparse

    @property
    def is_plain(self) -> bool:
        """Whether messages are the float32 tensors themselves."""
        return self._config.is_plain and self._ranks_kept == 1 and not self._sparse

    def send(
        self,
        update: Mapping[str, Tensor],
        error: Mapping[str, Tensor],
        round_index: int,
        sender: str = "",
        frozen: Mapping[str, Tensor] | None = None,
    ) -> Sent:
        """Encode `update` and the earlier `error` of the same sender.

        `frozen` holds the factors that the update does not move: where only the most important ranks travel, they say
        how much each does.
        """
        whole = {name: tensor + error[name] if name in error else tensor for name, tensor in update.items()}
        message = self.encode(whole, round_index, sender, frozen or {})
        received = self.decode(message, {name: tensor.shape for name, tensor in update.items()}, round_index)
        left = {name: tensor - received[name] for name, tensor in whole.items()} if self._feedback else {}
        return Sent(message, received, left)

    def encode(
        self,
        tensors: Mapping[str, Tensor],
        round_index: int,
        sender: str = "",
        frozen: Mapping[str, Tensor] | None = None,
    ) -> bytes:
        """Return the message of `tensors`, which may be of any real type."""
        flat = _flat(tensors)
        head = b""
        if self._ranks_kept < 1:
            chosen = _important_ranks(tensors, frozen or {}, self._ranks_kept)
            positions = _positions_of_ranks({name: t.shape for name, t in tensors.items()}, chosen)
            head = np.packbits(chosen).tobytes()
        elif self._sparse:
            positions = np.flatnonzero(flat)
            head = len(positions).to_bytes(4, "little") + _rice_encode(positions, len(flat))
        elif self._config.mask == "top-k":
            count = self._count(len(flat))
            positions = np.sort(np.argpartition(-np.abs(flat), count - 1)[:count])
            head = _rice_encode(positions, len(flat))
        else:
            positions = self._known_positions(len(flat), round_index)
        rng = None if self._feedback else derive_rng(self._seed, "rounding", self._direction, round_index, sender)
        numbers = _quantize(flat[positions], self._config.quantizer, rng)
        return head + numbers if head else numbers

    def decode(self, message: Message, shapes: Mapping[str, torch.Size], round_index: int) -> dict[str, Tensor]:
        """Return the tensors of a message, float32, zero where nothing was sent.

        Raises:
            RoundError: it is not a message of this codec for these shapes.
        """
        size = sum(shape.numel() for shape in shapes.values())
        try:
            positions, used = self._read_positions(message, shapes, size, round_index)
            count = positions.stop - positions.start if isinstance(positions, slice) else len(positions)
            values = _dequantize(memoryview(message)[used:], count, self._config.quantizer)
        except (ValueError, IndexError) as error:
            raise RoundError(
                f"a message of {len(message)} bytes is none of the codec {self._config.mask} x "
                f"{self._config.quantizer} for {size} numbers ({error})"
            ) from error
        flat = values
        if count < size or not isinstance(positions, slice):
            flat = np.zeros(size, dtype=np.float32)
            flat[positions] = values
        tensors, start = {}, 0
        for name, shape in shapes.items():
            tensors[name] = torch.from_numpy(flat[start : start + shape.numel()].copy()).view(shape)
            start += shape.numel()
        return tensors

    def _read_positions(
        self, message: Message, shapes: Mapping[str, torch.Size], size: int, round_index: int
    ) -> tuple[np.ndarray | slice, int]:
        """Return the positions that a message holds, ascending, and the bytes that they took of it."""
        if self._ranks_kept < 1:
            num_ranks = sum(_rank_of(name, shape) for name, shape in shapes.items())
            length = -(-num_ranks // 8)
            chosen = _unpack(message[:length], 1, num_ranks).astype(bool)
            return _positions_of_ranks(shapes, chosen), length
        if self._sparse:
            positions, length = _rice_decode(message[4:], int.from_bytes(message[:4], "little"), size)
            return positions, 4 + length
        if self._config.mask == "top-k":
            return _rice_decode(message, self._count(size), size)
        return self._known_positions(size, round_index), 0

    def _count(self, size: int) -> int:
        return max(1, round(self._config.density * size))

    def _known_positions(self, size: int, round_index: int) -> np.ndarray | slice:
        """Return the positions that follow from the round alone, the same for all clients; of neighbours, a slice."""
        if self._config.mask == "seeded":
            rng = derive_rng(self._seed, "mask", self._direction, round_index)
            return np.sort(rng.choice(size, self._count(size), replace=False))
        if self._config.mask == "round-robin":
            num_segments = min(size, round(1 / self._config.density))
            pass_index, turn = divmod(round_index, num_segments)
            # An order for each pass: what happens in every other round only must not meet every other segment only.
            order = derive_rng(self._seed, "segments", self._direction, pass_index).permutation(num_segments)
            segment = int(order[turn])
            return slice(size * segment // num_segments, size * (segment + 1) // num_segments)
        return slice(0, size)


def _flat(tensors: Mapping[str, Tensor]) -> np.ndarray:
    return torch.cat([tensor.detach().flatten().float() for tensor in tensors.values()]).numpy()


# ------------------------------------------------------------------------------------------------------------ ranks


def _rank_of(name: str, shape: torch.Size) -> int:
    return shape[0] if factor_of(name) == "lora_A" else shape[1]


def _important_ranks(update: Mapping[str, Tensor], frozen: Mapping[str, Tensor], share: float) -> np.ndarray:
    """Return which components of all layers, bool [sum of ranks], are the `share` that changes the product most.

    Component i of a layer whose B moves by dB changes it by ||dB[:, i]|| ||A[i, :]||, and the other way round
    (2410.22815).
    """
    scores = []
    for name, step in update.items():
        factor = factor_of(name)
        module = name.removesuffix(f".{factor}.weight")
        other = FACTORS[1 - FACTORS.index(factor)]
        still = frozen[f"{module}.{other}.weight"]
        scores.append(_component_norms(step, factor) * _component_norms(still, other))
    whole = torch.cat(scores).numpy()
    count = max(1, round(share * len(whole)))
    chosen = np.zeros(len(whole), dtype=bool)
    chosen[np.argsort(-whole, kind="stable")[:count]] = True
    return chosen


def _component_norms(tensor: Tensor, factor: str) -> Tensor:
    return tensor.norm(dim=1 if factor == "lora_A" else 0)


def _positions_of_ranks(shapes: Mapping[str, torch.Size], chosen: np.ndarray) -> np.ndarray:
    """Return the positions in the flat update of all numbers of the chosen components."""
    parts, start, rank_start = [], 0, 0
    for name, shape in shapes.items():
        rank = _rank_of(name, shape)
        wanted = chosen[rank_start : rank_start + rank]
        inside = np.zeros(tuple(shape), dtype=bool)
        if factor_of(name) == "lora_A":
            inside[wanted] = True
        else:
            inside[:, wanted] = True
        parts.append(start + np.flatnonzero(inside))
        start, rank_start = start + shape.numel(), rank_start + rank
    return np.concatenate(parts)


# -------------------------------------------------------------------------------------------------------- positions


def _rice_parameter(count: int, size: int) -> int:
    """Return the bits of the remainder that suit gaps with a mean of size / count."""
    return max(0, math.floor(math.log2(max(1.0, math.log(2) * size / count))))


def _rice_encode(positions: np.ndarray, size: int) -> bytes:
    """Return ascending positions as Golomb-Rice codes of their gaps: all remainders, then all quotients in unary."""
    if not len(positions):
        return b""
    bits = _rice_parameter(len(positions), size)
    gaps = np.diff(positions, prepend=-1) - 1
    ends = np.cumsum((gaps >> bits) + 1)  # a quotient q is q zeros and a one
    unary = np.zeros(ends[-1], dtype=np.uint8)
    unary[ends - 1] = 1
    return _pack(gaps & ((1 << bits) - 1), bits) + np.packbits(unary).tobytes()


def _rice_decode(message: Message, count: int, size: int) -> tuple[np.ndarray, int]:
    if not count:
        return np.zeros(0, dtype=np.int64), 0
    if count > size:
        raise ValueError(f"{count} positions are named")
    bits = _rice_parameter(count, size)
    used = -(-count * bits // 8)
    remainders = _unpack(message[:used], bits, count)
    longest = count + (size >> bits)
    unary = np.unpackbits(np.frombuffer(message[used : used + -(-longest // 8)], dtype=np.uint8))
    ends = np.flatnonzero(unary)[:count]
    if len(ends) < count:
        raise ValueError("its positions end early")
    gaps = ((np.diff(ends, prepend=-1) - 1) << bits) + remainders
    positions = np.cumsum(gaps + 1) - 1
    if positions[-1] >= size:
        raise ValueError("a position is out of range")
    return positions, used + -(-(int(ends[-1]) + 1) // 8)


CHUNK = 1 << 20
"""Numbers that are packed at a time: each takes eight bytes for every bit meanwhile."""


def _pack(values: np.ndarray, bits: int) -> bytes:
    """Return unsigned numbers of so many bits one after another."""
    shifts = np.arange(bits - 1, -1, -1)
    chunks = (values[start : start + CHUNK] for start in range(0, len(values), CHUNK))
    return b"".join(np.packbits(((chunk[:, None] >> shifts) & 1).astype(np.uint8)).tobytes() for chunk in chunks)


def _unpack(packed: Message, bits: int, count: int) -> np.ndarray:
    if len(packed) != -(-count * bits // 8):
        raise ValueError("it is too short")
    values, places = np.zeros(count, dtype=np.int64), 1 << np.arange(bits - 1, -1, -1, dtype=np.int64)
    for start in range(0, count, CHUNK):
        part = values[start : start + CHUNK]
        taken = np.frombuffer(packed, dtype=np.uint8)[start * bits // 8 : -(-(start + len(part)) * bits // 8)]
        part[:] = np.unpackbits(taken, count=len(part) * bits).reshape(len(part), bits).astype(np.int64) @ places
    return values


# ---------------------------------------------------------------------------------------------------------- numbers


def _quantize(values: np.ndarray, quantizer: str, rng: np.random.Generator | None) -> bytes:
    """Return float32 `values` as bytes; with `rng`, integers are rounded at random so that their mean is right."""
    if quantizer == "fp32":
        return values.astype("<f4", copy=False).tobytes()
    if quantizer == "bf16":
        return _to_bfloat16(values)
    bits = BITS[quantizer]
    groups = _grouped(values)
    if quantizer == "sign":
        sizes = np.minimum(GROUP, len(values) - GROUP * np.arange(len(groups)))
        scales = np.abs(groups).sum(axis=1) / sizes
    else:
        scales = np.abs(groups).max(axis=1)
    sent = _to_bfloat16(scales.astype(np.float32))
    unit = _of_bfloat16(sent)[:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.nan_to_num(np.where(unit > 0, groups / unit, 0.0)).clip(-1, 1)
    codes = _codes(relative, quantizer, rng).reshape(-1)[: len(values)]
    return sent + _pack(codes, bits)


def _codes(relative: np.ndarray, quantizer: str, rng: np.random.Generator | None) -> np.ndarray:
    """Return the code of each number in [-1, 1]: int8 and int4 have a level at zero, 2 bits and the sign do not."""
    if quantizer == "sign":
        return (relative >= 0).astype(np.int64)
    top, offset = _levels(quantizer)
    exact = relative * top + offset
    rounded = np.floor(exact + (0.5 if rng is None else rng.random(exact.shape)))
    return rounded.clip(0, 2 * offset).astype(np.int64)


def _levels(quantizer: str) -> tuple[float, float]:
    """Return (t, o): the level of code c is (c - o) / t."""
    return {"int8": (127.0, 127.0), "int4": (7.0, 7.0), "2-bit": (1.5, 1.5)}[quantizer]


def _dequantize(packed: Message, count: int, quantizer: str) -> np.ndarray:
    if quantizer in {"fp32", "bf16"}:
        width = 4 if quantizer == "fp32" else 2
        if len(packed) != width * count:
            raise ValueError(f"expected {width * count} bytes of numbers")
        return np.frombuffer(packed, dtype="<f4") if quantizer == "fp32" else _of_bfloat16(packed)
    num_scales = -(-count // GROUP)
    scales = _of_bfloat16(packed[: 2 * num_scales])
    codes = _unpack(packed[2 * num_scales :], BITS[quantizer], count)
    if quantizer == "sign":
        levels = 2.0 * codes - 1
    else:
        top, offset = _levels(quantizer)
        levels = (codes - offset) / top
    return (levels * np.repeat(scales, GROUP)[:count]).astype(np.float32)


def _grouped(values: np.ndarray) -> np.ndarray:
    """Return [groups, GROUP], the last filled up with zeros."""
    return np.pad(values, (0, -len(values) % GROUP)).reshape(-1, GROUP)


def _to_bfloat16(values: np.ndarray) -> bytes:
    return torch.from_numpy(np.ascontiguousarray(values)).bfloat16().view(torch.int16).numpy().astype("<i2").tobytes()


def _of_bfloat16(packed: Message) -> np.ndarray:
    halves = torch.from_numpy(np.frombuffer(packed, dtype="<i2").astype(np.int16))
    return halves.view(torch.bfloat16).float().numpy()
