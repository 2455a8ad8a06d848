"""Low-rank operators B A, never dense, and sketches of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True, eq=False)
class LowRank:
    """The matrix ``B @ A``, B [m, R] and A [R, n], float64. Sums concatenate, so R grows; nothing is m x n."""

    b: Tensor
    a: Tensor

    def __add__(self, other: LowRank) -> LowRank:
        return LowRank.sum([self, other])

    @staticmethod
    def sum(terms: Sequence[LowRank]) -> LowRank:
        """Return the sum of at least one matrix, concatenated once."""
        return LowRank(torch.cat([term.b for term in terms], dim=1), torch.cat([term.a for term in terms], dim=0))

    def __mul__(self, factor: float) -> LowRank:
        return LowRank(self.b * factor, self.a)

    __rmul__ = __mul__

    def __sub__(self, other: LowRank) -> LowRank:
        return self + other * -1.0

    @property
    def rank(self) -> int:
        """R: an upper bound of the matrix's rank."""
        return self.b.shape[1]

    def compact(self) -> LowRank:
        """Return the same matrix with R <= min(m, n)."""
        if self.rank <= min(self.b.shape[0], self.a.shape[1]):
            return self
        if self.b.shape[0] <= self.a.shape[1]:
            return LowRank(torch.eye(self.b.shape[0], dtype=self.b.dtype), self.b @ self.a)
        return LowRank(self.b @ self.a, torch.eye(self.a.shape[1], dtype=self.a.dtype))

    def components(self) -> LowRank:
        """Return the same matrix as its singular components, the largest first: B = U S^1/2, A = S^1/2 V^T.

        Two thin QR factorisations and the SVD of an R x R core: O((m + n) R^2). R is at most min(m, n); components that
        are zero to rounding may be among them.
        """
        small = self.compact()
        q_b, r_b = torch.linalg.qr(small.b)
        q_a, r_a = torch.linalg.qr(small.a.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T)
        root = s.sqrt()
        return LowRank(q_b @ u * root, root[:, None] * (vh @ q_a.T))

    def singular_values(self) -> Tensor:
        """Return those of a matrix that `components` or `truncate` returned, [R]."""
        return self.b.norm(dim=0).square()

    def part(self, first: int, last: int | None = None) -> LowRank:
        """Return the components [first, last)."""
        return LowRank(self.b[:, first:last], self.a[first:last])

    def truncate(self, rank: int) -> LowRank:
        """Return the best approximation of `rank` (Eckart-Young) by its `components`.

        Components beyond the matrix's own rank are zero, so the result always has `rank` columns.
        """
        return self.components().part(0, rank).widened(rank)

    def widened(self, rank: int) -> LowRank:
        """Return the same matrix by `rank` components, those that it lacks being zero."""
        missing = rank - self.rank
        return LowRank(pad(self.b, (0, missing)), pad(self.a, (0, 0, 0, missing)))

    def with_orthonormal_rows(self) -> LowRank:
        """Return the same matrix as B = U S, A = V^T with as many rows as A has: they span what these spanned.

        That holds where B is zero, too. Rows beyond n are zero.
        """
        q_a, r_a = torch.linalg.qr(self.a.T)
        core = self.b @ r_a.T  # with more rows than columns, U is not wanted whole: it would be m x m
        u, s, vh = torch.linalg.svd(core, full_matrices=core.shape[0] < core.shape[1])
        b = pad(u[:, : len(s)] * s, (0, len(vh) - len(s)))
        return LowRank(b, vh @ q_a.T).widened(self.rank)

    def minimal(self, smallest: float) -> LowRank:
        """Return the same matrix but for components whose singular value is not above `smallest`: few columns."""
        return self.components().above(smallest)

    def above(self, smallest: float) -> LowRank:
        """Do so with a matrix that `components` returned, or a part of it."""
        return self.part(0, int((self.singular_values() > smallest).sum()))

    def norm(self) -> float:
        """Return the Frobenius norm, to rounding of the largest term of the sum (no squares are subtracted)."""
        small = self.compact()
        return float(torch.linalg.norm(torch.linalg.qr(small.b).R @ torch.linalg.qr(small.a.T).R.T))

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product, O((m + n) R R')."""
        return float(((self.b.T @ other.b) * (self.a @ other.a.T)).sum())

    def dense(self) -> Tensor:
        """Return the m x n matrix itself (tests, and merging one layer into its base)."""
        return self.b @ self.a


SKETCH_COLUMNS = 64


@dataclass(frozen=True, eq=False)
class Sketch:
    """What is left of a matrix M [m, n] to measure it by: M G for a fixed random G [n, q] of signs.

    ||M G||_F^2 / q is ||M||_F^2 in expectation, with a relative standard deviation of sqrt(2 / q) at most, and less
    when it is added up over many matrices. Sums of sketches are sketches of sums.
    """

    image: Tensor
    """M G, float64 [m, q]"""
    signs: Tensor
    """G"""

    @staticmethod
    def of(matrix: LowRank, name: str) -> Sketch:
        """Return the sketch of a matrix, with the signs that belong to `name`."""
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        signs = torch.randint(0, 2, (matrix.a.shape[1], SKETCH_COLUMNS), generator=generator).double() * 2 - 1
        return Sketch(matrix.b @ (matrix.a @ signs), signs)

    def __add__(self, matrix: LowRank) -> Sketch:
        return Sketch(self.image + matrix.b @ (matrix.a @ self.signs), self.signs)

    def __sub__(self, matrix: LowRank) -> Sketch:
        return self + matrix * -1.0

    def __mul__(self, factor: float) -> Sketch:
        return Sketch(self.image * factor, self.signs)

    def norm(self) -> float:
        """Return the estimate of the Frobenius norm."""
        return float(self.image.norm()) / self.signs.shape[1] ** 0.5
