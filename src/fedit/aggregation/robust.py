"""Rules that a minority of malicious clients cannot steer.

They act on updates, each client's a whole vector, and weight all clients alike, since who lies about its update lies
about its rows. They hold all updates of a round at once. How far two clients are apart is told by what their updates do
and by how they are written: (c B, A / c) does what (B, A) does, and would hijack any mean of factors.

In front of each, bucketing (2006.09365) may average `bucket_size` clients drawn at random: what honest clients of
different data have in common stands out, and a bucket with a malicious client is malicious.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from fedit.aggregation.combine import average, conclude, low_rank
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from fedit.config import RunConfig

Updates = Sequence[Mapping[str, Tensor]]
"""Of each client or bucket, float64"""


class _RobustRule(Aggregation, ABC):
    robust: ClassVar[bool] = True
    weighting: ClassVar[str] = "uniform"
    bucket_size: int = Field(default=1, ge=1)

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        held: list[dict[str, Tensor]] = []

        def holding() -> Iterator[ClientUpdate]:
            for result in updates:
                if result.num_examples:
                    held.append({name: tensor.double() for name, tensor in result.update.tensors.items()})
                    yield result

        mean = average(adapter, holding(), "uniform")
        return conclude(adapter, mean.product, self.center(adapter, self._in_buckets(held, rng), len(held)))

    @abstractmethod
    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        """Return the update that stands for all of them, which are those of clients or of buckets of them."""

    def check(self, run: RunConfig) -> None:
        num_clients = getattr(run.partition, "num_clients", None)
        if self.bucket_size > 1 and num_clients is not None:
            buckets = -(-run.cohort.num_sampled(num_clients) // self.bucket_size)
            if buckets < 3:
                raise ConfigError(
                    f"[aggregation] bucket_size = {self.bucket_size} leaves {buckets} buckets of a cohort, too few to "
                    "tell a bad one from the others. Lower it, to have three at least."
                )

    def _in_buckets(self, held: Updates, rng: np.random.Generator) -> Updates:
        if self.bucket_size == 1:
            return held
        order = rng.permutation(len(held))
        buckets = [order[start : start + self.bucket_size] for start in range(0, len(held), self.bucket_size)]
        return [_mean([held[index] for index in bucket]) for bucket in buckets]


class _AgainstAShare(_RobustRule):
    malicious: float = Field(default=0.2, ge=0, lt=0.5)
    """The share of clients that may be malicious"""

    def num_malicious(self, num_clients: int, most: int) -> int:
        """Return how many of the updates may be bad: one client spoils its whole bucket."""
        return max(0, min(int(self.malicious * num_clients), most))


class Median(_RobustRule):
    """The median of every coordinate of the factors (1803.01498); of an even number, the mean of the middle two.

    Examples:
        >>> Median().bucket_size
        1
    """

    name: ClassVar[str] = "median"

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        first, last = (len(updates) - 1) // 2, len(updates) // 2
        return {name: values[first : last + 1].mean(dim=0) for name, values in _sorted(updates)}


class TrimmedMean(_AgainstAShare):
    """The mean of every coordinate of the factors without its largest and smallest values (1803.01498).

    Of K clients, floor(`malicious` K) are left out at either end; of buckets, as many, if a value is left.

    Examples:
        >>> TrimmedMean(malicious=0.1).malicious
        0.1
    """

    name: ClassVar[str] = "trimmed-mean"

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        cut = self.num_malicious(num_clients, (len(updates) - 1) // 2)
        return {name: values[cut : len(updates) - cut].mean(dim=0) for name, values in _sorted(updates)}


class Krum(_AgainstAShare):
    """The update whose K - f - 2 nearest others are nearest (1703.02757), f = floor(`malicious` K).

    Of several equally near ones (with one neighbour each, the nearest two are), the mean. The guarantee needs
    K >= 2 f + 3 clients: with fewer, f is the largest number that this allows.

    Examples:
        >>> Krum().malicious
        0.2
    """

    name: ClassVar[str] = "krum"

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        scores, _ = self._scores(adapter, updates, num_clients)
        return _mean([updates[index] for index in _up_to(scores, scores.min())])

    def _scores(self, adapter: Adapter, updates: Updates, num_clients: int) -> tuple[Tensor, int]:
        """Return how far each update is from its neighbours [K], and f."""
        count = len(updates)
        num_malicious = self.num_malicious(num_clients, (count - 3) // 2)
        neighbours = max(1, count - num_malicious - 2)
        # The first column is each update's distance to itself.
        return squared_distances(adapter, updates).sort(dim=1).values[:, 1 : 1 + neighbours].sum(dim=1), num_malicious


class MultiKrum(Krum):
    """The mean of the K - f updates with the best scores of Krum (1703.02757).

    Examples:
        >>> MultiKrum(malicious=0.3).malicious
        0.3
    """

    name: ClassVar[str] = "multi-krum"

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        scores, num_malicious = self._scores(adapter, updates, num_clients)
        worst = scores.sort().values[len(updates) - num_malicious - 1]
        return _mean([updates[index] for index in _up_to(scores, worst)])


class RFA(_RobustRule):
    """The geometric median of the updates, by the smoothed Weiszfeld algorithm (1912.13445).

    The point with the least sum of distances (not of their squares) to all updates is a weighted mean of them, with
    weights in proportion to one over the distance; they are found by a few iterations, and the factors averaged with
    them.

    Examples:
        >>> RFA().iterations
        10
    """

    name: ClassVar[str] = "rfa"
    iterations: int = Field(default=10, ge=1)

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        squares = squared_distances(adapter, updates)
        weights = torch.full((len(updates),), 1 / len(updates), dtype=torch.float64)
        for _ in range(self.iterations):
            # ||x_i - sum_j w_j x_j||^2 by the distances of the points alone
            to_center = squares @ weights - weights @ squares @ weights / 2
            weights = 1 / to_center.clamp(min=1e-12).sqrt()
            weights = weights / weights.sum()
        return _mean(updates, weights)


class NormClipping(_RobustRule):
    """The mean of updates that are scaled down to a norm of `max_norm` where theirs is larger (1911.07963).

    "median" is the median of the round's norms: no update counts for much more than an ordinary one. The norm is the
    L2 norm of all factors' steps together.

    Examples:
        >>> NormClipping(max_norm=0.5).max_norm
        0.5
    """

    name: ClassVar[str] = "norm-clipping"
    max_norm: Literal["median"] | Annotated[float, Field(gt=0)] = "median"

    def center(self, adapter: Adapter, updates: Updates, num_clients: int) -> dict[str, Tensor]:
        norms = torch.stack([torch.cat([t.flatten() for t in update.values()]).norm() for update in updates])
        bound = norms.quantile(0.5) if self.max_norm == "median" else torch.tensor(self.max_norm).double()
        factors = (bound / norms.clamp(min=1e-300)).clamp(max=1.0)
        return _mean(updates, factors / len(updates))


def squared_distances(adapter: Adapter, updates: Updates) -> Tensor:
    """Return how far updates are apart, [K, K], squared and float64.

    The sum of two squared distances, each divided by an ordinary one (the median client's median):
    ||s (B_i A_i - B_j A_j)||_F over all layers, by tr((B_i^T B_j)(A_j A_i^T)) and never dense, and the L2 distance of
    the factors. Both are those of points in a space with an inner product, and so is the sum.
    """
    steps = torch.stack([torch.cat([tensor.flatten() for tensor in update.values()]) for update in updates])
    adapted = [low_rank(adapter, update) for update in updates]
    inner = torch.zeros(len(updates), len(updates), dtype=torch.float64)
    for module in adapter.modules():
        matrices = [each[module] for each in adapted]
        b, a = torch.cat([matrix.b for matrix in matrices], dim=1), torch.cat([matrix.a for matrix in matrices])
        blocks = (b.T @ b) * (a @ a.T)
        rank = matrices[0].rank
        inner += blocks.view(len(updates), rank, len(updates), rank).sum(dim=(1, 3))
    return sum((_relative(_distances(gram)) for gram in (inner, steps @ steps.T)), torch.zeros_like(inner))


def _distances(gram: Tensor) -> Tensor:
    """Return squared distances of points by their inner products."""
    norms = gram.diagonal()
    squares = (norms[:, None] + norms[None, :] - 2 * gram).clamp(min=0)
    # What is left of equal points is rounding.
    return torch.where(squares <= 1e-14 * (norms[:, None] + norms[None, :]), torch.zeros_like(squares), squares)


def _relative(squares: Tensor) -> Tensor:
    if not squares.any():
        return squares
    # Sorted, a row begins with the distance to itself. Of K - 1 others, an honest client's median one is honest, too.
    ordinary = squares.sort(dim=1).values[:, 1:].median(dim=1).values.median()
    return squares / (ordinary if ordinary > 0 else squares[squares > 0].min())


def _sorted(updates: Updates) -> Iterator[tuple[str, Tensor]]:
    """Yield every tensor's values of all clients, [K, *shape], ascending."""
    for name in updates[0]:
        yield name, torch.stack([update[name] for update in updates]).sort(dim=0).values


def _mean(updates: Updates, weights: Tensor | None = None) -> dict[str, Tensor]:
    """Return the weighted sum of updates, or their mean."""
    factors = [1 / len(updates)] * len(updates) if weights is None else weights.tolist()
    return {
        name: sum((f * update[name] for f, update in zip(factors, updates, strict=True)), torch.zeros(()).double())
        for name in updates[0]
    }


def _up_to(scores: Tensor, worst: Tensor) -> list[int]:
    """Return who has a score of `worst` at most, up to rounding."""
    return (scores <= worst * (1 + 1e-9)).nonzero().flatten().tolist()
