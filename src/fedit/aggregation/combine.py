"""The primitives that aggregation rules are made of.

`combine` goes through a round's updates once, one by one, and takes the weighted mean: of the factors, and of what the
adapters do, which is not the same. A rule then chooses new factors and may leave a rest to the side; `conclude` says
what was lost. With p_k the weights, normalised over the clients that answered, and s_k = lora_alpha / r_k, the exact
mean that all rules are measured by is M = sum_k p_k s_k B_k A_k. Everything is float64 and factored: nothing is m x n.

A rule that only has to say what it lost takes `average` in place of `combine`, and holds no more than a few updates.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from fedit.adapter import factor_of
from fedit.interfaces import Adapter, Aggregate, ClientUpdate, RoundError
from fedit.lowrank import LowRank, Sketch

Weighting = Literal["examples", "tokens", "uniform", "fednova"]
"""By a client's rows, the tokens it trained on, equal, or by rows and inverse steps."""
WeightingByNorm = Weighting | Literal["norm"]
"""Or by ||s_k B_k A_k||_F"""
Modules = Mapping[str, LowRank]
"""A low-rank matrix for each adapted layer"""
Align = Callable[[Adapter, ClientUpdate], ClientUpdate]
"""Changes a client's update, given what it had received."""

EXACT_RANK = 192
"""Components of a matrix up to which its norm is exact; with more, what was lost is measured by a sketch."""


@dataclass(frozen=True, eq=False)
class Mean:
    """The weighted mean of a round's updates."""

    update: Mapping[str, Tensor]
    """sum_k p_k update_k, factor by factor; adapters of a smaller rank than the global one are padded with zeros"""
    product: Modules
    """M by module: the exact mean of what the clients' adapters do"""


@dataclass(frozen=True, eq=False)
class MeasuredMean:
    """As `Mean`, but of M only what its distance to another matrix can be measured by."""

    update: Mapping[str, Tensor]
    product: Mapping[str, LowRank | Sketch]


def combine(
    adapter: Adapter,
    updates: Iterable[ClientUpdate],
    weighting: WeightingByNorm,
    align: Align = lambda received, result: result,
) -> Mean:
    """Consume `updates` one by one, in their order, each changed by `align` with what its client had received.

    The sum of the factors is one adapter; M keeps the clients' factors: sum_k r_k of them, m or n at most. Where the
    clients trained one factor only, M is linear in it, and needs no more than its mean.

    Raises:
        RoundError: no update has a positive weight.
    """
    terms = {module: _Terms() for module in adapter.modules()}
    update = _pass_through(adapter, updates, weighting, align, terms)
    if _is_linear(update):
        return Mean(update, scaled(low_rank(adapter, update), adapter.scaling))
    return Mean(update, {module: terms.pop(module).exact() for module in list(terms)})


def average(
    adapter: Adapter,
    updates: Iterable[ClientUpdate],
    weighting: WeightingByNorm,
    align: Align = lambda received, result: result,
) -> MeasuredMean:
    """Do as `combine` with bounded memory: M is exact up to `EXACT_RANK` components, and a sketch of them beyond.

    Raises:
        RoundError: no update has a positive weight.
    """
    terms = {module: _Terms(module) for module in adapter.modules()}
    update = _pass_through(adapter, updates, weighting, align, terms)
    if _is_linear(update):
        return MeasuredMean(update, scaled(low_rank(adapter, update), adapter.scaling))
    return MeasuredMean(update, {module: terms.pop(module).measurable() for module in list(terms)})


def _pass_through(
    adapter: Adapter,
    updates: Iterable[ClientUpdate],
    weighting: WeightingByNorm,
    align: Align,
    terms: Mapping[str, _Terms],
) -> dict[str, Tensor]:
    """Return the mean of the updates, and add what the clients' adapters do to `terms`, divided by the same."""
    weights = _Weights(weighting)
    sums: dict[str, Tensor] = {}
    for answer in updates:
        received = adapter.cut(answer.update.rank)
        result = align(received, answer)
        tuned = _after(received, result.update.tensors)
        norms = [(matrix() * received.scaling).norm() for matrix in tuned.values()] if weighting == "norm" else []
        weight = weights.of(result, math.hypot(*norms))
        if weight == 0:
            continue
        for name, tensor in result.update.tensors.items():
            term = weight * _of_full_rank(adapter, received, name, tensor)
            sums[name] = sums[name].add_(term) if name in sums else term
        for module, matrix in tuned.items() if not _is_linear(result.update.tensors) else ():
            terms[module].add(matrix() * received.scaling * weight)
    divisor = weights.divisor()
    if weighting == "fednova":  # its weights do not add up to 1: what moves is the difference from what was received
        rest = adapter.scaling * (divisor - weights.total)
        for module, matrix in low_rank(adapter).items():
            terms[module].add(matrix * rest)
    for sum_of in terms.values():
        sum_of.divide(divisor)
    return {name: tensor.div_(divisor) for name, tensor in sums.items()}


def _is_linear(update: Mapping[str, Tensor]) -> bool:
    """Tell whether one factor moves alone, so that what the adapter does is linear in the update."""
    return len({factor_of(name) for name in update}) == 1


def conclude(
    adapter: Adapter,
    product: Mapping[str, LowRank | Sketch],
    delta: Mapping[str, Tensor],
    side_step: Modules | None = None,
    *,
    replaces_side: bool = False,
) -> Aggregate:
    """Return the aggregate with its ``aggregation_loss``, ||M - what is kept||_F / ||M||_F over all modules.

    What is kept is the new adapter's product and what the side gained. 0 where M is zero. Measured by sketches, it is
    right to a few percent of itself.
    """
    side_step = side_step or {}
    kept = _after(adapter, delta)
    whole, lost = 0.0, 0.0
    for module, matrix in product.items():
        if isinstance(matrix, LowRank) and matrix.rank > EXACT_RANK:
            matrix = Sketch.of(matrix, module)
        parts = [kept[module]() * adapter.scaling]
        if module in side_step:
            parts.append(side_step[module])
        if replaces_side and module in adapter.side:
            parts.append(adapter.side[module] * -1.0)
        whole = math.hypot(whole, matrix.norm())
        lost = math.hypot(lost, (matrix - LowRank.sum(parts)).norm())
    return Aggregate(delta, side_step, replaces_side, {"aggregation_loss": lost / whole if whole > 0 else 0.0})


# ------------------------------------------------------------------------------------------------- pieces of a rule


def low_rank(adapter: Adapter, update: Mapping[str, Tensor] | None = None) -> dict[str, LowRank]:
    """Return B A (without the scaling) of every module of ``adapter + update``, float64. No step is a step of zero."""
    return {module: matrix() for module, matrix in _after(adapter, update or {}).items()}


def _after(adapter: Adapter, update: Mapping[str, Tensor]) -> dict[str, Callable[[], LowRank]]:
    """Do as `low_rank`, each matrix when it is wanted: all at once take four times the adapter's memory."""

    def factors(module: str, tensors: Mapping[str, Tensor]) -> LowRank:
        b, a = (
            tensors[name].double() + update[name].double() if name in update else tensors[name].double()
            for name in (f"{module}.lora_B.weight", f"{module}.lora_A.weight")
        )
        return LowRank(b, a)

    if adapter.is_plain:
        return {module: partial(factors, module, adapter.tensors) for module in adapter.modules()}
    tensors = {name: tensor.double() for name, tensor in adapter.tensors.items()}
    for name, step in update.items():
        tensors[name] = tensors[name] + step.double()
    plain, update = adapter.with_tensors(tensors).plain().tensors, {}
    return {module: partial(factors, module, plain) for module in adapter.modules()}


def scaled(factors: Modules, factor: float) -> dict[str, LowRank]:
    """Return every module's matrix times `factor`."""
    return {module: matrix * factor for module, matrix in factors.items()}


def steps_to(factors: Modules, adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors by which `adapter` has to move to become the given factors (without scaling)."""
    delta: dict[str, Tensor] = {}
    for module, matrix in factors.items():
        for name, factor in ((f"{module}.lora_A.weight", matrix.a), (f"{module}.lora_B.weight", matrix.b)):
            delta[name] = factor - adapter.tensors[name].double()
    return delta


def keep_trainable(factors: LowRank, received: Tensor) -> LowRank:
    """Give components that are zero the rows of the received A [r, n]: with A = B = 0 none of them could ever grow."""
    sizes = factors.b.norm(dim=0)
    empty = sizes <= 1e-12 * sizes.max()
    return LowRank(factors.b * ~empty, torch.where(empty[:, None], received.double(), factors.a))


def largest(product: Modules, adapter: Adapter) -> tuple[dict[str, LowRank], dict[str, LowRank]]:
    """Return new factors (without scaling), the r largest components of each matrix, and what these leave."""
    factors, rest = {}, {}
    for module, matrix in product.items():
        parts = matrix.components()
        kept, root = parts.part(0, adapter.rank).widened(adapter.rank), adapter.scaling**0.5
        received = adapter.tensors[f"{module}.lora_A.weight"]
        factors[module] = keep_trainable(LowRank(kept.b / root, kept.a / root), received)
        rest[module] = parts.part(adapter.rank)
    return factors, rest


# ---------------------------------------------------------------------------------------------------------- weights


class _Weights:
    """The weight of each update as it comes, and what their weighted sum is divided by to be a mean."""

    def __init__(self, weighting: WeightingByNorm) -> None:
        self._weighting = weighting
        self.total = 0.0
        """Sum of the weights so far"""
        self._rows, self._steps = 0.0, 0.0

    def of(self, result: ClientUpdate, norm: float) -> float:
        """Return the weight of a client whose adapter does what has this `norm`.

        With "fednova" (2007.07481) it is n_k / t_k for its t_k local steps, and the mean is stretched by the mean
        number of steps: who takes many steps moves the mean no more than who takes few.
        """
        rows = float(result.num_examples)
        self._rows += rows
        self._steps += rows * result.num_steps
        if self._weighting == "norm":
            weight = norm
        else:
            weights = {
                "examples": rows,
                "tokens": float(result.num_tokens),
                "uniform": 1.0 + len(result.others),
                "fednova": rows / max(1, result.num_steps),
            }
            weight = weights[self._weighting]
        self.total += weight
        return weight

    def divisor(self) -> float:
        """Return what turns the weighted sum into the mean; raise RoundError where nobody has a weight."""
        if self.total == 0:
            raise RoundError(
                f"No update of this round has a positive weight (weighting = {self._weighting!r}): clients with "
                "num_examples = 0?"
            )
        return self._rows**2 / self._steps if self._weighting == "fednova" else self.total


def _of_full_rank(adapter: Adapter, received: Adapter, name: str, step: Tensor) -> Tensor:
    """Return a client's step of a tensor as one of the global adapter: components that the client lacks are zero, the
    others are rescaled to do under ``lora_alpha / rank`` what they did under its own.
    """
    if received.rank == adapter.rank:
        return step.double()
    factor, missing = (adapter.rank / received.rank) ** 0.5, adapter.rank - received.rank
    tuned = factor * (received.tensors[name].double() + step.double())
    whole = pad(tuned, (0, 0, 0, missing) if name.endswith(".lora_A.weight") else (0, missing))
    return whole - adapter.tensors[name].double()


class _Terms:
    """A sum of low-rank matrices that are given one by one. With a name, it may become a sketch."""

    def __init__(self, sketched_as: str | None = None) -> None:
        self._sketched_as = sketched_as
        self._terms: list[LowRank] = []
        self._sketch: Sketch | None = None

    def add(self, term: LowRank) -> None:
        """Add a matrix; compact what has twice the rank that the sum can have: each time, it costs a dense product."""
        if self._sketch is not None:
            self._sketch = self._sketch + term
            return
        self._terms.append(term)
        rank = sum(each.rank for each in self._terms)
        if self._sketched_as is not None and rank > EXACT_RANK:
            self._sketch = Sketch.of(LowRank.sum(self._terms), self._sketched_as)
            self._terms = []
        elif rank > 2 * min(term.b.shape[0], term.a.shape[1]):
            self._terms = [LowRank.sum(self._terms).compact()]

    def divide(self, divisor: float) -> None:
        """Divide the sum."""
        self._terms = [term * (1 / divisor) for term in self._terms]
        if self._sketch is not None:
            self._sketch = self._sketch * (1 / divisor)

    def exact(self) -> LowRank:
        """Return the sum."""
        return LowRank.sum(self._terms).compact()

    def measurable(self) -> LowRank | Sketch:
        """Return the sum, or its sketch where the sum was not kept."""
        return self.exact() if self._sketch is None else self._sketch
