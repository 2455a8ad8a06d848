"""FedIT: the mean of the factors."""

from __future__ import annotations

from collections.abc import Iterable
from typing import ClassVar

from fedit.aggregation.combine import Weighting, aggregation_loss, combine, low_rank
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate


class FedIT(Aggregation):
    """Average A and B separately, as FedAvg does with any parameters (2305.05644).

    A <- sum_k p_k A_k,  B <- sum_k p_k B_k,  p_k proportional to the client's rows (or equal).

    The mean of the factors is not the mean of the products: what is lost is the weighted covariance
    sum_k p_k (B_k - B)(A_k - A), second order in how far the clients drift apart; every round reports it as
    ``aggregation_loss``. All clients need the same rank.

    >>> FedIT(weighting="uniform").weighting
    'uniform'
    """

    name: ClassVar[str] = "fedit"
    weighting: Weighting = "examples"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate]) -> Aggregate:
        combined = combine(adapter, updates, self.weighting)
        kept = low_rank(adapter, combined.mean_update)
        kept = {module: factors * adapter.scaling for module, factors in kept.items()}
        return Aggregate(combined.mean_update, {"aggregation_loss": aggregation_loss(combined.product, kept)})
