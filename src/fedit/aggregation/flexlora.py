"""FlexLoRA: the mean of the products, cut to the rank by a singular value decomposition."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

import torch

from fedit.aggregation.combine import Weighting, aggregation_loss, combine, difference, low_rank
from fedit.aggregation.lowrank import LowRank
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate


class FlexLoRA(Aggregation):
    """Average what the adapters do, then keep its largest components (2402.11505).

    M = sum_k p_k s_k B_k A_k exactly, in factored form; B A <- the best rank-r approximation of M / s, with the
    singular values split evenly between B and A. Clients may have different ranks: each receives the first r_k
    components. What the cut loses is ``aggregation_loss``, the share of M outside its r largest components.

    The basis changes in every round, so a server optimizer that remembers past updates makes no sense with it.

    >>> FlexLoRA().mixed_ranks
    True
    """

    name: ClassVar[str] = "flexlora"
    mixed_ranks: ClassVar[bool] = True
    refactors: ClassVar[bool] = True
    weighting: Weighting = "examples"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate]) -> Aggregate:
        product = combine(adapter, updates, self.weighting).product
        received = low_rank(adapter)
        factors = {
            module: _keep_trainable((m * (1 / adapter.scaling)).truncate(adapter.rank), received[module])
            for module, m in product.items()
        }
        kept = {module: f * adapter.scaling for module, f in factors.items()}
        return Aggregate(difference(factors, adapter), {"aggregation_loss": aggregation_loss(product, kept)})


def _keep_trainable(factors: LowRank, received: LowRank) -> LowRank:
    """Give the components that the mean lacks (clients of small ranks) the received A: at A = B = 0 none could grow."""
    sizes = factors.b.norm(dim=0)
    empty = sizes <= 1e-12 * sizes.max()
    return LowRank(factors.b * ~empty, torch.where(empty[:, None], received.a, factors.a))
