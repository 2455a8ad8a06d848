"""Rules that keep the mean of the factors: all that travels is what the clients train, and the server only adds."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field

from fedit.aggregation.combine import (
    Weighting,
    WeightingByNorm,
    average,
    combine,
    conclude,
    keep_trainable,
    low_rank,
    steps_to,
)
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate
from fedit.lowrank import LowRank

if TYPE_CHECKING:
    import numpy as np


class FedIT(Aggregation):
    """Average A and B separately, as FedAvg does with any parameters (2305.05644).

    A <- sum_k p_k A_k,  B <- sum_k p_k B_k,  p_k proportional to the client's rows (or another weighting).

    The mean of the factors is not the mean of the products: what is lost is the weighted covariance
    sum_k p_k (B_k - B)(A_k - A), second order in how far the clients drift apart; every round reports it as
    ``aggregation_loss``. All clients need the same rank.

    Examples:
        >>> FedIT(weighting="uniform").weighting
        'uniform'
    """

    name: ClassVar[str] = "fedit"
    sums: ClassVar[bool] = True
    weighting: Weighting = "examples"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = average(adapter, updates, self.weighting)
        return conclude(adapter, mean.product, mean.update)


class FedSALoRA(FedIT):
    """Train both factors, share A; every client's B is its own and stays with it (2410.01463).

    A <- sum_k p_k A_k. The server never sees a B, so there is no global model but the base, and what the mean of the
    products would have been is unknown (no ``aggregation_loss``). Evaluated are the clients' own models, A with each
    B_k.

    Examples:
        >>> FedSALoRA().shared(0)
        ('lora_A',)
    """

    name: ClassVar[str] = "fedsa-lora"
    sums: ClassVar[bool] = True

    def shared(self, round_index: int) -> Collection[str]:
        return ("lora_A",)

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        return Aggregate(average(adapter, updates, self.weighting).update)


class HetLoRA(Aggregation):
    """Adapters of different ranks, padded with zeros to the largest and averaged (2401.06432).

    A <- sum_k p_k [A_k; 0],  B <- sum_k p_k [B_k, 0], each rescaled from lora_alpha / r_k to the global scale, and p_k
    proportional to ||s_k B_k A_k||_F: who learned more counts more. A client receives the first r_k components. One
    that nobody of the cohort has does nothing afterwards, and keeps its row of A, from which it can grow again. The
    paper's clients also find their ranks themselves: `[objective] name = "self-pruning"`.

    Examples:
        >>> HetLoRA().weighting
        'norm'
    """

    name: ClassVar[str] = "hetlora"
    mixed_ranks: ClassVar[bool] = True
    weighting: WeightingByNorm = "norm"

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = average(adapter, updates, self.weighting)
        tuned = low_rank(adapter, mean.update)
        factors = {m: keep_trainable(matrix, adapter.tensors[f"{m}.lora_A.weight"]) for m, matrix in tuned.items()}
        return conclude(adapter, mean.product, steps_to(factors, adapter))


class FedRotLoRA(FedIT):
    """Rotate every client's factors towards those that it received, then average them (2602.23638).

    (B_k Q_k, Q_k^T A_k) does what (B_k, A_k) does for any orthogonal Q_k. The one that brings both closest to the
    received factors is U V^T of the singular value decomposition U S V^T = A_k A^T + B_k^T B (Procrustes). What the
    mean of the factors loses by clients that turned apart is gone; what it loses by clients that learned different
    things stays. The rotation needs nothing that the server does not have, so it is done there.

    Examples:
        >>> FedRotLoRA().rotation_invariant
        True
    """

    name: ClassVar[str] = "fedrot-lora"
    sums: ClassVar[bool] = False
    rotation_invariant: ClassVar[bool] = True

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = average(adapter, updates, self.weighting, _rotated)
        return conclude(adapter, mean.product, mean.update)


def _rotated(received: Adapter, result: ClientUpdate) -> ClientUpdate:
    reference, step = low_rank(received), {}
    for module, tuned in low_rank(received, result.update.tensors).items():
        target = reference[module]
        u, _, vh = torch.linalg.svd(tuned.a @ target.a.T + tuned.b.T @ target.b)
        turned = LowRank(tuned.b @ (u @ vh), (u @ vh).T @ tuned.a)
        step[f"{module}.lora_A.weight"] = turned.a - target.a
        step[f"{module}.lora_B.weight"] = turned.b - target.b
    return replace(result, update=result.update.with_tensors(step))


class LoRAFAIR(FedIT):
    """Average the factors, then correct B towards the mean of the products (2411.14961).

    B <- B_mean + R A^T (A A^T + regularisation I)^-1 with A = A_mean and R = M / s - B_mean A: the ridge regression of
    what was lost on the rows of A, as much of it as fits into the rank with this A. Only B_mean and A travel.

    Examples:
        >>> LoRAFAIR().regularisation
        0.01
    """

    name: ClassVar[str] = "lora-fair"
    sums: ClassVar[bool] = False
    regularisation: float = Field(default=0.01, gt=0)

    def aggregate(self, adapter: Adapter, updates: Iterable[ClientUpdate], rng: np.random.Generator) -> Aggregate:
        mean = combine(adapter, updates, self.weighting)
        delta = dict(mean.update)
        for module, factors in low_rank(adapter, mean.update).items():
            lost = mean.product[module] * (1 / adapter.scaling) - factors
            gram = factors.a @ factors.a.T + self.regularisation * torch.eye(len(factors.a), dtype=factors.a.dtype)
            correction = torch.linalg.solve(gram, factors.a @ lost.a.T @ lost.b.T).T
            delta[f"{module}.lora_B.weight"] = delta[f"{module}.lora_B.weight"] + correction
        return conclude(adapter, mean.product, delta)
