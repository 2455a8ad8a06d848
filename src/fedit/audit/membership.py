"""Who was trained on: how much more likely the model made a row tells members from others (1709.01604, 2111.08440).

A row's score is what its response lost in loss, ``loss(base) - loss(model)``, nats per token, as far as that does not
follow from ``loss(base)``: the base, which everybody has, says how hard the row is. Beside it the plain loss. As many
rows of each category are taken of the clients (members) as of the held-out rows (others), so that what differs between
categories tells nothing; and the base itself, which was trained on neither, has to be at 0.5: if its interval excludes
that, the two kinds of rows differ by more than membership.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from fedit.audit.bounds import auc, bootstrap_interval, calibrated, hits_at
from fedit.evaluation.heldout import response_losses
from fedit.interfaces import Adapter, DataError, EncodedExample, derive_rng
from fedit.model import StackedModel

MOST_ROWS = 1000
"""Of either kind"""
FALSE_SHARE = 0.01


@dataclass(frozen=True)
class Membership:
    """How well members are told from others."""

    num_rows: int
    """Of either kind"""
    auc: float
    auc_interval: tuple[float, float]
    true_share: float
    """Members found at a threshold that takes 1% of the others for members"""
    true_share_interval: tuple[float, float]
    plain_auc: float
    """Without the base as reference"""
    base_auc: float
    """Of the base itself, which knows neither"""
    base_interval: tuple[float, float]
    curve: tuple[tuple[float, float], ...] = ()
    """False and true shares at some thresholds"""
    by_category: bool = True
    """Whether there are as many of each category; where clients have none that held-out rows have, there cannot be."""


class Rows:
    """Members and others, balanced by category, and the base's losses of them."""

    def __init__(
        self, model: StackedModel, members: Sequence[EncodedExample], others: Sequence[EncodedExample], seed: int
    ) -> None:
        """Draw the rows and measure the base.

        Raises:
            DataError: there are no members, or no others.
        """
        if not members or not others:
            raise DataError("members are told from others, and of one of them there is no row.")
        self._model, self._seed = model, seed
        categories = [{row.example.category for row in rows} for rows in (members, others)]
        self._by_category = not categories[0].isdisjoint(categories[1])
        self._rows = _balanced(members, others, derive_rng(seed, "audit", "members"), by_category=self._by_category)
        self.num_each = len(self._rows) // 2
        self._num_tokens = np.asarray([row.num_supervised for row in self._rows])
        self._base = self._losses(None)

    def judge(self, adapter: Adapter) -> Membership:
        """Attack the model of an adapter."""
        tuned = self._losses(adapter)
        rng = derive_rng(self._seed, "audit", "resample")
        members, others = np.split(calibrated(self._base - tuned, self._base), 2)
        share = lambda found, false: hits_at(found, false, FALSE_SHARE) / len(found)
        base = np.split(-self._base, 2)
        return Membership(
            self.num_each,
            auc(members, others),
            bootstrap_interval(auc, members, others, rng),
            share(members, others),
            bootstrap_interval(share, members, others, rng),
            auc(*np.split(-tuned, 2)),
            auc(base[0], base[1]),
            bootstrap_interval(auc, base[0], base[1], rng),
            _curve(members, others),
            self._by_category,
        )

    def _losses(self, adapter: Adapter | None) -> np.ndarray:
        """Return the loss of each row, nats per response token."""
        return response_losses(self._model, [adapter], self._rows)[0] / self._num_tokens


def _balanced(
    members: Sequence[EncodedExample],
    others: Sequence[EncodedExample],
    rng: np.random.Generator,
    *,
    by_category: bool,
) -> list[EncodedExample]:
    """Return so many of the members, then as many of the others, of each category."""
    kinds = [_by_category(rows) if by_category else {"": rows} for rows in (members, others)]
    sizes = {name: min(len(kinds[0][name]), len(kinds[1][name])) for name in kinds[0].keys() & kinds[1].keys()}
    most = MOST_ROWS / max(1, sum(sizes.values()))
    chosen = [list[EncodedExample](), list[EncodedExample]()]
    for name in sorted(sizes):
        size = sizes[name] if most >= 1 else max(1, int(sizes[name] * most))
        for rows, into in zip(kinds, chosen, strict=True):
            into += [rows[name][index] for index in rng.permutation(len(rows[name]))[:size]]
    return chosen[0] + chosen[1]


def _by_category(rows: Sequence[EncodedExample]) -> Mapping[str, list[EncodedExample]]:
    by_category: dict[str, list[EncodedExample]] = defaultdict(list)
    for row in rows:
        by_category[row.example.category].append(row)
    return by_category


def _curve(members: np.ndarray, others: np.ndarray, points: int = 60) -> tuple[tuple[float, float], ...]:
    """Return false and true shares, from the strictest threshold to the loosest."""
    thresholds = np.unique(np.quantile(np.concatenate([members, others]), np.linspace(0, 1, points)))[::-1]
    shares = [(float((others > t).mean()), float((members > t).mean())) for t in thresholds]
    return ((0.0, 0.0), *((round(false, 4), round(true, 4)) for false, true in shares), (1.0, 1.0))
