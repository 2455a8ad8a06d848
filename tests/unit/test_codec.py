"""Compressed messages: what they say, how long they are, and that errors are made up for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from fedit import codec as codec_module
from fedit.codec import BITS, GROUP, Codec, _pack, _rice_decode, _rice_encode, _unpack
from fedit.config import CodecConfig
from fedit.interfaces import RoundError

SHAPES = {
    "q.lora_A.weight": (4, 30),
    "q.lora_B.weight": (50, 4),
    "v.lora_A.weight": (4, 30),
    "v.lora_B.weight": (70, 4),
}
SIZE = sum(rows * columns for rows, columns in SHAPES.values())
QUANTIZERS = ["fp32", "bf16", "int8", "int4", "2-bit", "sign"]
MASKS = [{"mask": "dense"}, *({"mask": name, "density": 0.1} for name in ("top-k", "seeded", "round-robin"))]


def tensors(seed: int = 0, scale: float = 1.0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([values[name].flatten() for name in SHAPES])


def codec(feedback: bool = True, ranks_kept: float = 1.0, **config: Any) -> Codec:
    return Codec(CodecConfig(**config), seed=7, direction="up", feedback=feedback, ranks_kept=ranks_kept)


def through(one: Codec, values: dict[str, Tensor], round_index: int = 0, sender: str = "a") -> tuple[bytes, Tensor]:
    message = one.encode(values, round_index, sender)
    return message, flat(one.decode(message, {name: tensor.shape for name, tensor in values.items()}, round_index))


# ------------------------------------------------------------------------------------------------------------ masks


@pytest.mark.parametrize("mask", MASKS)
def test_what_is_sent_arrives_unchanged_and_the_rest_is_zero(mask: dict[str, Any]) -> None:
    values = tensors()
    message, got = through(codec(**mask), values)
    sent = got != 0
    assert torch.equal(got[sent], flat(values)[sent])
    count = round(mask.get("density", 1.0) * SIZE)
    assert int(sent.sum()) == count
    assert len(message) >= 4 * count
    if mask["mask"] != "top-k":
        assert len(message) == 4 * count


def test_top_k_takes_the_largest() -> None:
    values = tensors()
    _, got = through(codec(mask="top-k", density=0.25), values)
    assert flat(values)[got != 0].abs().min() >= flat(values)[got == 0].abs().max()


def test_drawn_positions_change_with_the_round_and_are_the_same_for_all_clients() -> None:
    one = codec(mask="seeded", density=0.25)
    first, same, later = (
        through(one, tensors(seed), index, sender)[1] != 0
        for seed, index, sender in ((0, 0, "a"), (1, 0, "b"), (0, 1, "a"))
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, later)


def test_segments_cover_everything_in_turn() -> None:
    one = codec(mask="round-robin", density=1 / 3)
    covered = torch.stack([through(one, tensors(), index)[1] != 0 for index in range(60)])
    for start in range(0, 60, 3):
        assert torch.equal(covered[start : start + 3].sum(dim=0), torch.ones(SIZE, dtype=torch.int64))
    assert bool(covered[::3].any(dim=0).all()), "who sends in every third round only sends everything, too"


@given(st.data())
def test_positions_survive_their_code(data: st.DataObject) -> None:
    size = data.draw(st.integers(1, 5000))
    count = data.draw(st.integers(1, size))
    positions = np.sort(np.random.default_rng(data.draw(st.integers(0, 99))).choice(size, count, replace=False))
    message = _rice_encode(positions, size)
    decoded, used = _rice_decode(message + b"\xff" * 3, count, size)
    assert np.array_equal(decoded, positions)
    assert used == len(message)


def test_positions_take_little_more_than_their_entropy() -> None:
    size, count = 200_000, 1_000
    positions = np.sort(np.random.default_rng(0).choice(size, count, replace=False))
    share = count / size
    entropy = size * -(share * math.log2(share) + (1 - share) * math.log2(1 - share))
    assert 8 * len(_rice_encode(positions, size)) < 1.05 * entropy


def test_a_message_has_the_largest_components_of_all_layers() -> None:
    """LoRA-A2's mask: whole columns of B, by what they change of the product with the frozen A."""
    update = {name: tensor for name, tensor in tensors().items() if ".lora_B" in name}
    frozen = {name: tensor for name, tensor in tensors(1).items() if ".lora_A" in name}
    frozen["q.lora_A.weight"] = frozen["q.lora_A.weight"] * torch.tensor([100.0, 0.0, 50.0, 0.0])[:, None]
    one = codec(ranks_kept=0.5)
    message = one.encode(update, 0, "a", frozen)
    got = one.decode(message, {name: tensor.shape for name, tensor in update.items()}, 0)
    sent = {name: (tensor != 0).all(dim=0) for name, tensor in got.items()}
    assert sent["q.lora_B.weight"].tolist() == [True, False, True, False]
    importance = update["v.lora_B.weight"].norm(dim=0) * frozen["v.lora_A.weight"].norm(dim=1)
    assert (
        sorted(importance.argsort(descending=True)[:2].tolist()) == sent["v.lora_B.weight"].nonzero().flatten().tolist()
    )
    assert all(torch.equal(got[name][:, columns], update[name][:, columns]) for name, columns in sent.items())
    assert len(message) == 1 + 4 * (2 * 50 + 2 * 70)


# ------------------------------------------------------------------------------------------------------- quantizers


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_a_message_is_as_long_as_its_bits(quantizer: str) -> None:
    message, _ = through(codec(quantizer=quantizer), tensors())
    if quantizer in BITS:
        assert len(message) == math.ceil(SIZE * BITS[quantizer] / 8) + 2 * math.ceil(SIZE / GROUP)
    else:
        assert len(message) == SIZE * {"fp32": 4, "bf16": 2}[quantizer]


@pytest.mark.parametrize(("quantizer", "steps"), [("bf16", 256), ("int8", 254), ("int4", 14), ("2-bit", 3)])
@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_nearest_rounding_is_off_by_half_a_step(quantizer: str, steps: int, scale: float) -> None:
    """A step is 2 / steps of the group's largest number, and of bfloat16 2^-8 of the number itself."""
    values = flat(tensors(scale=scale))
    _, got = through(codec(quantizer=quantizer), tensors(scale=scale))
    groups = [slice(start, start + GROUP) for start in range(0, SIZE, GROUP)]
    for group in groups:
        bound = values[group].abs() if quantizer == "bf16" else values[group].abs().max()
        assert bool(((got - values)[group].abs() <= bound * (1 / steps + 1 / 256) * 1.001).all())


@pytest.mark.parametrize(("quantizer", "steps"), [("int8", 254), ("int4", 14), ("2-bit", 3)])
def test_random_rounding_is_right_in_the_mean(quantizer: str, steps: int) -> None:
    one = codec(feedback=False, quantizer=quantizer)
    draws = torch.stack([through(one, tensors(), sender=str(sender))[1] for sender in range(400)])
    assert float(draws.std(dim=0).max()) > 0
    error = (draws.mean(dim=0) - flat(tensors())).abs()
    # 5 standard errors of the mean of 400 (a deviation is half a step at most), and the rounding of the scale to
    # bfloat16, which clips the largest of a group.
    step = 2 * float(flat(tensors()).abs().max()) / steps
    assert bool((error <= 5 * step / 2 / 20 + flat(tensors()).abs() / 128).all())
    assert float((draws.mean(dim=0) - flat(tensors())).mean().abs()) < 5 * step / 2 / (400 * SIZE) ** 0.5 + 1 / 512


def test_signs_keep_the_mean_size() -> None:
    values = flat(tensors())
    _, got = through(codec(quantizer="sign"), tensors())
    assert torch.equal(got >= 0, values >= 0)
    assert got[:GROUP].abs().max() == pytest.approx(float(values[:GROUP].abs().mean()), rel=1 / 128)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("mask", MASKS)
def test_zero_and_what_is_not_finite(mask: dict[str, Any], quantizer: str) -> None:
    """No update is no step (but for the two quantizers that have no zero, a step of size 0); a bad one stays bad."""
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    _, got = through(codec(quantizer=quantizer, **mask), zero)
    assert torch.equal(got, torch.zeros(SIZE))
    broken = {name: torch.full(shape, math.nan) for name, shape in SHAPES.items()}
    _, got = through(codec(quantizer=quantizer, **mask), broken)
    assert not bool(torch.isfinite(got).all())


# --------------------------------------------------------------------------------------------------- error feedback


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("mask", MASKS)
def test_with_feedback_nothing_is_lost_only_late(mask: dict[str, Any], quantizer: str) -> None:
    """After any number of rounds, what arrived and the error add up to the updates."""
    one, error = codec(quantizer=quantizer, **mask), {}
    arrived, updates = torch.zeros(SIZE), torch.zeros(SIZE)
    for round_index in range(12):
        update = tensors(round_index)
        sent = one.send(update, error, round_index, "a")
        error = dict(sent.error)
        arrived, updates = arrived + flat(dict(sent.received)), updates + flat(update)
        left = flat(error) if error else torch.zeros(SIZE)
        assert torch.allclose(arrived + left, updates, atol=1e-4)


def test_without_feedback_nothing_is_kept() -> None:
    assert codec(feedback=False, quantizer="int4").send(tensors(), {}, 0).error == {}


# --------------------------------------------------------------------------------------------------------- messages


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("damage", [lambda message: b"", lambda message: message[:-1], lambda message: message + b"\0"])
def test_a_damaged_message_is_refused(mask: dict[str, Any], quantizer: str, damage: Any) -> None:
    one, values = codec(quantizer=quantizer, **mask), tensors()
    message = damage(one.encode(values, 0))
    with pytest.raises(RoundError, match="none of the codec"):
        one.decode(message, {name: tensor.shape for name, tensor in values.items()}, 0)


def test_a_pack_goes_on_after_each_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = {bits: _pack(np.arange(100) % 2**bits, bits) for bits in (1, 2, 4, 8, 11)}
    monkeypatch.setattr(codec_module, "CHUNK", 8)
    for bits, packed in whole.items():
        assert _pack(np.arange(100) % 2**bits, bits) == packed
        assert _unpack(packed, bits, 100).tolist() == [number % 2**bits for number in range(100)]


def test_segments_are_of_equal_size() -> None:
    with pytest.raises(ValueError, match="round-robin needs a density of 1/2"):
        CodecConfig(mask="round-robin", density=0.4)


@pytest.mark.parametrize("config", [{"mask": "top-k"}, {"density": 0.5}])
def test_a_mask_and_its_density_go_together(config: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="needs another mask than dense"):
        CodecConfig(**config)


def test_sparse_messages_name_what_is_not_zero() -> None:
    one = Codec(CodecConfig(), seed=7, direction="up", feedback=False, sparse=True)
    values = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    empty, got = through(one, values)
    assert empty == bytes(4)
    assert not got.any()
    values["v.lora_A.weight"][2, 5] = -0.5
    message, got = through(one, values)
    assert torch.equal(got, flat(values))
    assert 8 < len(message) <= 12
    shapes = {name: tensor.shape for name, tensor in values.items()}
    for count in (SIZE + 1, 2**31):
        with pytest.raises(RoundError, match="positions are named"):
            one.decode(count.to_bytes(4, "little") + message[4:], shapes, 0)


@pytest.mark.parametrize(
    ("message", "reason"),
    [(bytes(200), "end early"), (b"\xff" * 25 + b"\x24\x92\x49" * 25, "out of range"), (b"\xff" * 20, "too short")],
)
def test_positions_that_cannot_be(message: bytes, reason: str) -> None:
    """Two hundred of a thousand: 25 bytes of remainders, then quotients, which are all two in the second message."""
    with pytest.raises(ValueError, match=reason):
        _rice_decode(message, 200, 1000)
