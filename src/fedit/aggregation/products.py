"""Rules that average what the adapters do, exactly, and then have to put it into a rank."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from pydantic import Field

from fedit.aggregation.combine import (
    EXACT_RANK,
    Modules,
    Weighting,
    combine,
    conclude,
    largest,
    low_rank,
    scaled,
    steps_to,
)
from fedit.interfaces import FACTORS, Adapter, Aggregate, Aggregation, ClientUpdate
from fedit.lowrank import LowRank

if TYPE_CHECKING:
    import numpy as np


class _Product(Aggregation):
    weighting: Weighting = "examples"
    rotation_invariant: ClassVar[bool] = True


class FLoRA(_Product):
    """Stack the clients' factors: their sum is exact, goes beside the base, and a fresh adapter follows (2409.05976).

    side += M = sum_k p_k s_k B_k A_k, as [B_1 .. B_K] and [p_1 s_1 A_1; ..; p_K s_K A_K]; A is drawn anew, B = 0. Each
    client downloads the factors of all, and the side grows by sum_k r_k in every round, to m or n at most.

    Examples:
        >>> FLoRA().keeps_side, FLoRA().mixed_ranks
        (True, True)
    """

    name: ClassVar[str] = "flora"
    mixed_ranks: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    keeps_side: ClassVar[bool] = True

    def returned(self, round_index: int) -> Collection[str]:
        return ()

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        product = combine(adapter, updates, self.weighting).product
        return conclude(adapter, product, steps_to(fresh_factors(adapter, rng), adapter), product)


def fresh_factors(adapter: Adapter, rng: np.random.Generator) -> dict[str, LowRank]:
    """Return factors as PEFT initialises them: A uniform in +-1/sqrt(n), B zero."""
    factors = {}
    for module, received in low_rank(adapter).items():
        bound = received.a.shape[1] ** -0.5
        a = torch.from_numpy(rng.uniform(-bound, bound, tuple(received.a.shape)))
        factors[module] = LowRank(torch.zeros_like(received.b), a)
    return factors


class FedExLoRA(_Product):
    """Average the factors, and put what that loses beside the base (2410.09432).

    A <- A_mean, B <- B_mean, side += M - s B_mean A_mean: exact. The residual is the covariance of the factors, of rank
    (K - 1) r at most; each client downloads it.

    Examples:
        >>> FedExLoRA().refactors
        False
    """

    name: ClassVar[str] = "fedex-lora"
    keeps_side: ClassVar[bool] = True

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = combine(adapter, updates, self.weighting)
        kept = scaled(low_rank(adapter, mean.update), adapter.scaling)
        residual = {module: _without_zeros(matrix, kept[module]) for module, matrix in mean.product.items()}
        return conclude(adapter, mean.product, mean.update, residual)


def _without_zeros(matrix: LowRank, kept: LowRank) -> LowRank:
    """Return the difference in few columns, up to ranks at which finding them costs more than they take."""
    difference = matrix - kept
    if difference.rank > 4 * EXACT_RANK:
        return difference.compact()
    # Below 1e-12 of M is what float64 makes of a difference that is zero.
    return difference.minimal(1e-12 * matrix.norm())


class FlexLoRA(_Product):
    """Average what the adapters do, then keep its largest components (2402.11505).

    M = sum_k p_k s_k B_k A_k exactly, in factored form; B A <- the best rank-r approximation of M / s, with the
    singular values split evenly between B and A. Clients may have different ranks: each receives the first r_k
    components. What the cut loses is ``aggregation_loss``, the share of M outside its r largest components.

    The basis changes in every round, so a server optimizer that remembers past updates makes no sense with it.

    Examples:
        >>> FlexLoRA().mixed_ranks
        True
    """

    name: ClassVar[str] = "flexlora"
    mixed_ranks: ClassVar[bool] = True
    refactors: ClassVar[bool] = True

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        product = combine(adapter, updates, self.weighting).product
        factors, _ = largest(product, adapter)
        return conclude(adapter, product, steps_to(factors, adapter))


class RaFLoRA(Aggregation):
    """FlexLoRA in which each component is averaged over the clients that have it (2602.13486).

    The j-th components of clients with r_k >= j are averaged with p_k / sum_{r_l >= j} p_l, so that high components,
    which few clients have, are not watered down by those that lack them. With equal ranks it is FlexLoRA. Against M the
    higher components are too large on purpose, and ``aggregation_loss`` shows it.

    Examples:
        >>> RaFLoRA().mixed_ranks
        True
    """

    name: ClassVar[str] = "raflora"
    mixed_ranks: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    rotation_invariant: ClassVar[bool] = True
    weighting: Literal["examples", "uniform"] = "examples"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        clients: list[tuple[float, int, Modules]] = []

        def noted() -> Iterator[ClientUpdate]:
            for result in updates:
                received = adapter.cut(result.update.rank)
                does = scaled(low_rank(received, result.update.tensors), received.scaling)
                weight = 1.0 if self.weighting == "uniform" else float(result.num_examples)
                clients.append((weight, received.rank, does))
                yield result

        product = combine(adapter, noted(), self.weighting).product
        factors, _ = largest({module: _by_components(clients, module) for module in product}, adapter)
        return conclude(adapter, product, steps_to(factors, adapter))


def _by_components(clients: list[tuple[float, int, Modules]], module: str) -> LowRank:
    """Return the sum over components of the weighted mean over the clients that have them."""
    terms, first = [], 0
    for rank in sorted({rank for weight, rank, _ in clients if weight > 0}):
        owners = [(weight, does[module]) for weight, owned, does in clients if owned >= rank]
        total = sum(weight for weight, _ in owners)
        terms += [matrix.part(first, rank) * (weight / total) for weight, matrix in owners]
        first = rank
    return LowRank.sum(terms)


class FedSVD(_Product):
    """Train B, and turn A to the directions that B uses (2505.12805).

    A is the same at all clients in a round, so B_mean A is exact; its singular value decomposition U S V^T gives
    A <- V^T, orthonormal, and B <- U S. Orthonormal rows keep the gradients of B, and their noise, well scaled. The
    rows of A stay in the space of the first A.

    Examples:
        >>> FedSVD().trained(0)
        ('lora_B',)
    """

    name: ClassVar[str] = "fedsvd"
    sums: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    rotation_invariant: ClassVar[bool] = False

    def trained(self, round_index: int) -> Collection[str]:
        return ("lora_B",)

    def returned(self, round_index: int) -> Collection[str]:
        return FACTORS

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = combine(adapter, updates, self.weighting)
        factors = {m: matrix.with_orthonormal_rows() for m, matrix in low_rank(adapter, mean.update).items()}
        return conclude(adapter, mean.product, steps_to(factors, adapter))


class FedMomentum(_Product):
    """Keep the largest components in the adapter and put the others beside the base (2603.08014).

    M / s = U S V^T; B <- U_r S_r^1/2, A <- S_r^1/2 V_r^T, and the components after the r-th go to the side: exact. What
    has most weight goes on being trained, in the basis of its own.

    Examples:
        >>> FedMomentum().refactors, FedMomentum().keeps_side
        (True, True)
    """

    name: ClassVar[str] = "fedmomentum"
    refactors: ClassVar[bool] = True
    keeps_side: ClassVar[bool] = True

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        product = combine(adapter, updates, self.weighting).product
        factors, rest = largest(product, adapter)
        side_step = {m: matrix.above(1e-12 * largest_of(factors[m], adapter)) for m, matrix in rest.items()}
        return conclude(adapter, product, steps_to(factors, adapter), side_step)


def largest_of(factors: LowRank, adapter: Adapter) -> float:
    """Return the largest singular value of what balanced factors do, the scaling included."""
    return float(factors.singular_values().max()) * adapter.scaling


class FedITPlus(_Product):
    """Keep the largest components in the adapter and of the rest, beside it, as many as matter.

    T = M + side is all that was learned. Its r largest components are the new adapter, balanced; of the others, the
    side keeps the fewest with which `energy` of ||T||_F^2 is kept, module by module. So nothing that matters is lost,
    the side is no larger than it has to be, and a client downloads the adapter and the side. energy = 1 is exact.

    Examples:
        >>> FedITPlus(energy=1.0).keeps_side
        True
    """

    name: ClassVar[str] = "fedit-plus"
    mixed_ranks: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    keeps_side: ClassVar[bool] = True
    energy: float = Field(default=0.99, gt=0, le=1)

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        product = combine(adapter, updates, self.weighting).product
        total = {m: matrix + adapter.side[m] if m in adapter.side else matrix for m, matrix in product.items()}
        factors, rest = largest(total, adapter)
        side = {}
        for module, matrix in rest.items():
            energies = matrix.singular_values().square()
            whole = total[module].norm() ** 2
            lost = energies.flip(0).cumsum(0).flip(0)  # by keeping all components before each
            needed = int((lost > (1 - self.energy) * whole + 1e-24 * whole).sum())
            side[module] = matrix.part(0, needed)
        return conclude(adapter, product, steps_to(factors, adapter), side, replaces_side=True)
