"""One pass over a round's updates: their weighted mean, factor by factor, and the exact mean of their products."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedit.aggregation.lowrank import LowRank
from fedit.interfaces import Adapter, ClientUpdate, RoundError

Weighting = Literal["examples", "uniform"]


@dataclass(frozen=True, eq=False)
class Combined:
    """With p_k the weights, normalised over the clients that answered; all float64."""

    mean_update: Mapping[str, Tensor]
    """sum_k p_k update_k, tensor by tensor; empty where the clients' ranks differ"""
    product: Mapping[str, LowRank]
    """sum_k p_k s_k B_k A_k by module: the exact mean of what the clients' adapters do"""


def combine(adapter: Adapter, updates: Iterable[ClientUpdate], weighting: Weighting) -> Combined:
    """Consume `updates` one by one, in their order. The exact product keeps their factors: sum_k r_k, m or n at most.

    Raises:
        RoundError: no update has a positive weight.
    """
    total = 0.0
    sums: dict[str, Tensor] = {}
    terms: dict[str, list[LowRank]] = {module: [] for module in adapter.modules()}
    equal_ranks = True
    for result in updates:
        weight = 1.0 if weighting == "uniform" else float(result.num_examples)
        if weight == 0:
            continue
        total += weight
        equal_ranks = equal_ranks and result.update.rank == adapter.rank
        if equal_ranks:
            for name, tensor in result.update.tensors.items():
                sums[name] = sums[name] + weight * tensor.double() if name in sums else weight * tensor.double()
        received = adapter.cut(result.update.rank)
        for module, factors in low_rank(received, result.update.tensors).items():
            terms[module].append(factors * (weight * result.update.scaling))
            # Twice the rank that the product can have: compacted for every client, it would cost a dense product each.
            if sum(term.rank for term in terms[module]) > 2 * min(factors.b.shape[0], factors.a.shape[1]):
                terms[module] = [LowRank.sum(terms[module]).compact()]
    if total == 0:
        raise RoundError("No update of this round has a positive weight (clients with num_examples = 0?).")
    return Combined(
        {name: tensor / total for name, tensor in sums.items()} if equal_ranks else {},
        {module: LowRank.sum(parts).compact() * (1 / total) for module, parts in terms.items()},
    )


def low_rank(adapter: Adapter, update: Mapping[str, Tensor] | None = None) -> dict[str, LowRank]:
    """Return B A (without the scaling) of every module of ``adapter + update``, float64."""
    result = {}
    for module in adapter.modules():
        factors = [
            adapter.tensors[name].double() + (0 if update is None else update[name].double())
            for name in (f"{module}.lora_B.weight", f"{module}.lora_A.weight")
        ]
        result[module] = LowRank(*factors)
    return result


def aggregation_loss(product: Mapping[str, LowRank], kept: Mapping[str, LowRank]) -> float:
    """Return ||product - kept||_F / ||product||_F over all modules; 0 where the product is zero."""
    lost = math.hypot(*[(product[module] - kept[module]).norm() for module in product])
    whole = math.hypot(*[factors.norm() for factors in product.values()])
    return lost / whole if whole > 0 else 0.0


def difference(new: Mapping[str, LowRank], adapter: Adapter) -> dict[str, Tensor]:
    """Return the tensors by which `adapter` has to move to become the factors `new` (without scaling)."""
    delta: dict[str, Tensor] = {}
    for module, factors in new.items():
        for name, factor in ((f"{module}.lora_A.weight", factors.a), (f"{module}.lora_B.weight", factors.b)):
            delta[name] = factor - adapter.tensors[name].to(torch.float64)
    return delta
