"""Many clients' updates as one, which a rule that needs no more than sums takes for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from fedit.interfaces import ClientUpdate

if TYPE_CHECKING:
    from torch import Tensor

MERGEABLE = ("examples", "tokens", "uniform")
"""Weightings under which a mean of means is the mean: each mean weighs as much as all that it is of"""


class Merged:
    """The weighted mean of updates that come one by one, float64; it holds no update.

    Its counts are the sums of theirs, so that it weighs as much as all of them, and its loss is their mean by tokens.
    """

    def __init__(self, weighting: str) -> None:
        self._weighting = weighting
        self._sums: dict[str, Tensor] = {}
        self._total = 0.0
        self._first: ClientUpdate | None = None

    def add(self, result: ClientUpdate) -> None:
        """Add an update of the shape of those before."""
        weight = {"examples": result.num_examples, "tokens": result.num_tokens, "uniform": 1}[self._weighting]
        self._total += weight
        for name, tensor in result.update.tensors.items():
            step = weight * tensor.double()
            self._sums[name] = self._sums[name] + step if name in self._sums else step
        if self._first is None:
            self._first = result
            return
        before, num_tokens = self._first, self._first.num_tokens + result.num_tokens
        self._first = replace(
            before,
            others=(*before.others, result.client),
            num_examples=before.num_examples + result.num_examples,
            num_tokens=num_tokens,
            num_steps=before.num_steps + result.num_steps,
            epsilon=max(filter(None, (before.epsilon, result.epsilon)), default=None),
            loss=(before.loss * before.num_tokens + result.loss * result.num_tokens) / max(1, num_tokens),
        )

    def result(self, order: Sequence[str]) -> ClientUpdate | None:
        """Return the mean, as the update of the first client in `order`, for the others too; None: there is none.

        Where nobody has a weight it is zero, and weighs nothing.
        """
        if self._first is None:
            return None
        first, *others = sorted((self._first.client, *self._first.others), key=list(order).index)
        divisor = self._total or 1.0
        mean = {name: (tensor / divisor).float() for name, tensor in self._sums.items()}
        update = self._first.update.with_tensors(mean)
        return replace(self._first, client=first, others=tuple(others), update=update)
