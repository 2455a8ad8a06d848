"""Low-rank operators against their dense matrices."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedit.lowrank import LowRank, Sketch

SHAPES = {"num_outputs": st.integers(1, 9), "num_inputs": st.integers(1, 9), "seed": st.integers(0, 2**32)}
RANKS = st.integers(1, 12)


def random(num_outputs: int, num_inputs: int, rank: int, seed: int) -> LowRank:
    rng = np.random.default_rng(seed)
    return LowRank(
        torch.from_numpy(rng.normal(size=(num_outputs, rank))), torch.from_numpy(rng.normal(size=(rank, num_inputs)))
    )


def matrix(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


# ------------------------------------------------------------------------------------------------------ hand numbers


def test_sum_product_and_norm_by_hand() -> None:
    left = LowRank(matrix([[1], [2]]), matrix([[3, 0]]))  # [[3, 0], [6, 0]]
    right = LowRank(matrix([[0], [1]]), matrix([[0, 4]]))  # [[0, 0], [0, 4]]
    assert (left + right).dense().tolist() == [[3, 0], [6, 4]]
    assert (left - right * 0.5).dense().tolist() == [[3, 0], [6, -2]]
    assert (2 * left).dense().tolist() == [[6, 0], [12, 0]]
    assert (left + right).rank == 2
    assert left.norm() == pytest.approx(math.sqrt(45), rel=1e-12)
    assert left.inner(right) == 0
    assert left.inner(left + right) == pytest.approx(45, rel=1e-12)


def test_truncation_by_hand() -> None:
    """diag(9, 4, 1) cut to two components, the singular values split evenly: B = A^T = diag(3, 2) up to signs."""
    cut = LowRank(torch.eye(3, dtype=torch.float64), torch.diag(matrix([[9, 4, 1]])[0])).truncate(2)
    assert torch.allclose(cut.dense(), torch.diag(matrix([[9, 4, 0]])[0]), atol=1e-14)
    assert torch.allclose(cut.b.abs(), matrix([[3, 0], [0, 2], [0, 0]]), atol=1e-14)
    assert torch.allclose(cut.a.abs(), matrix([[3, 0, 0], [0, 2, 0]]), atol=1e-14)


# --------------------------------------------------------------------------------------------- against dense matrices


@settings(max_examples=50, deadline=None)
@given(rank=RANKS, other_rank=RANKS, **SHAPES)
def test_arithmetic_is_that_of_the_matrices(num_outputs, num_inputs, seed, rank, other_rank) -> None:
    left, right = random(num_outputs, num_inputs, rank, seed), random(num_outputs, num_inputs, other_rank, seed + 1)
    torch.testing.assert_close((left + right).dense(), left.dense() + right.dense())
    torch.testing.assert_close((left - right).dense(), left.dense() - right.dense())
    assert left.norm() == pytest.approx(float(left.dense().norm()), rel=1e-10)
    assert left.inner(right) == pytest.approx(float((left.dense() * right.dense()).sum()), rel=1e-10, abs=1e-10)


@settings(max_examples=50, deadline=None)
@given(rank=RANKS, **SHAPES)
def test_compacting_keeps_the_matrix_and_bounds_the_rank(num_outputs, num_inputs, seed, rank) -> None:
    whole = random(num_outputs, num_inputs, rank, seed)
    small = whole.compact()
    torch.testing.assert_close(small.dense(), whole.dense(), rtol=1e-12, atol=1e-12)
    assert small.rank == min(rank, num_outputs, num_inputs)


@settings(max_examples=80, deadline=None)
@given(rank=RANKS, kept=st.integers(1, 6), **SHAPES)
def test_truncation_is_the_best_approximation(num_outputs, num_inputs, seed, rank, kept) -> None:
    """Eckart-Young: the same matrix as numpy's dense SVD cut to its largest components."""
    whole = random(num_outputs, num_inputs, rank, seed)
    u, s, vh = np.linalg.svd(whole.dense().numpy(), full_matrices=False)
    best = (u[:, :kept] * s[:kept]) @ vh[:kept]
    cut = whole.truncate(kept)
    assert cut.b.shape == (num_outputs, kept)
    assert cut.a.shape == (kept, num_inputs)
    assert np.abs(cut.dense().numpy() - best).max() < 1e-10 * max(1.0, s[0])
    assert (whole - cut).norm() == pytest.approx(np.sqrt((s[kept:] ** 2).sum()), rel=1e-9, abs=1e-10 * max(1.0, s[0]))


@settings(max_examples=50, deadline=None)
@given(rank=RANKS, kept=st.integers(1, 6), **SHAPES)
def test_truncation_balances_its_factors(num_outputs, num_inputs, seed, rank, kept) -> None:
    """Component by component ||b_i|| = ||a_i|| = sqrt(sigma_i), largest first; what the matrix lacks is zero."""
    whole = random(num_outputs, num_inputs, rank, seed)
    cut = whole.truncate(kept)
    values = np.zeros(kept)
    found = np.linalg.svd(whole.dense().numpy(), compute_uv=False)[:kept]
    values[: len(found)] = found
    scale = 1e-7 * max(1.0, values[0])  # sqrt of a value that should be 0 and is rounding
    np.testing.assert_allclose(cut.b.norm(dim=0).numpy(), np.sqrt(values), rtol=1e-8, atol=scale)
    np.testing.assert_allclose(cut.a.norm(dim=1).numpy(), np.sqrt(values), rtol=1e-8, atol=scale)


@settings(max_examples=30, deadline=None)
@given(rank=RANKS, kept=st.integers(1, 6), **SHAPES)
def test_rotated_factors_give_the_same_truncation(num_outputs, num_inputs, seed, rank, kept) -> None:
    whole = random(num_outputs, num_inputs, rank, seed)
    rotation = torch.linalg.qr(torch.from_numpy(np.random.default_rng(seed + 1).normal(size=(rank, rank)))).Q
    rotated = LowRank(whole.b @ rotation, rotation.T @ whole.a)
    torch.testing.assert_close(rotated.truncate(kept).dense(), whole.truncate(kept).dense(), rtol=1e-9, atol=1e-9)


def test_zero_stays_zero() -> None:
    zero = LowRank(torch.zeros(4, 2, dtype=torch.float64), torch.ones(2, 3, dtype=torch.float64))
    assert zero.norm() == 0
    assert zero.truncate(3).dense().abs().max() == 0
    assert bool(torch.isfinite(zero.truncate(3).b).all())


def test_nearly_equal_matrices_differ_by_what_they_differ() -> None:
    """The norm of a difference has no cancellation of squares: sqrt(a^2 + b^2 - 2ab) would be 0 or NaN here."""
    left = random(30, 20, 4, 0)
    right = LowRank(left.b * (1 + 1e-11), left.a)
    assert (left - right).norm() == pytest.approx(1e-11 * left.norm(), rel=1e-3)


def test_sketches_measure_sums_of_many_matrices() -> None:
    """Of 28 layers together, to a few percent; and what is subtracted from what it was made of is exactly nothing."""
    generator = torch.Generator().manual_seed(0)

    def draw() -> LowRank:
        b, a = torch.randn(40, 5, generator=generator), torch.randn(5, 60, generator=generator)
        return LowRank(b.double(), a.double())

    true, estimated = [], []
    for layer in range(28):
        first, second = draw(), draw()
        sketch = (Sketch.of(first, str(layer)) + second) * 0.5
        true.append(((first + second) * 0.5).norm())
        estimated.append(sketch.norm())
        assert (sketch - (first + second) * 0.5).norm() < 1e-10
    assert math.hypot(*estimated) == pytest.approx(math.hypot(*true), rel=0.05)
    other = draw()
    assert not torch.equal(Sketch.of(other, "one").image, Sketch.of(other, "another").image)
    assert torch.equal(Sketch.of(other, "one").image, Sketch.of(other, "one").image)
