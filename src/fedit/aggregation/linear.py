"""Rules under which clients train what their adapters are linear in: its mean is exact, and little travels."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from fedit.adapter import ALONG, AMOUNTS, CORE, SEEDS, TIED, VECTORS
from fedit.aggregation.factor_means import FedIT
from fedit.interfaces import Adapter, ConfigError

if TYPE_CHECKING:
    import numpy as np

    from fedit.config import RunConfig


class FFALoRA(FedIT):
    """Freeze A where it was drawn, train and average B (2403.12313).

    B <- sum_k p_k B_k. The adapter is linear in B, so this is the mean of the products: nothing is lost, noise that is
    added for privacy is not multiplied, and half travels. A is the same random matrix at every client, from the seed;
    what cannot be expressed in its r rows can never be learned.

    Examples:
        >>> FFALoRA().trained(3)
        ('lora_B',)
    """

    name: ClassVar[str] = "ffa-lora"

    def trained(self, round_index: int) -> Collection[str]:
        return ("lora_B",)


class RoLoRA(FedIT):
    """Train and average B in even rounds, A in odd ones (2502.01755).

    As one factor is everywhere the same in a round, the mean of the other is exact, and half travels. Rounds count
    from 0 and B comes first: while B = 0, the gradient of A is zero.

    Examples:
        >>> [RoLoRA().trained(round_index) for round_index in (0, 1, 2)]
        [('lora_B',), ('lora_A',), ('lora_B',)]
    """

    name: ClassVar[str] = "rolora"

    def trained(self, round_index: int) -> Collection[str]:
        return ("lora_B",) if round_index % 2 == 0 else ("lora_A",)


class LoRAA2(RoLoRA):
    """RoLoRA, of which each client sends only what matters most, under a budget (2410.22815).

    A component i of a layer matters by ||dB[:, i]|| ||A[i, :]||, what it changed of the product in this round (and the
    other way round while A is trained). The share `budget` of the components of all layers travels, so that layers
    compete; the mean counts what was not sent as unchanged, and is exact for what was. What a client left out is added
    to its next update of the same factor (error feedback), which the paper does not do: ``-o
    upload.error_feedback=false`` is the paper's.

    Examples:
        >>> LoRAA2(budget=0.25).ranks_kept
        0.25
    """

    name: ClassVar[str] = "lora-a2"
    budget: float = Field(default=0.5, gt=0, le=1)

    @property
    def ranks_kept(self) -> float:
        return self.budget


class FedSB(FedIT):
    """Train and average an r x r core between two frozen factors, W0 + s B R A (2502.15436).

    R <- sum_k p_k R_k from R = 0: exact, since the adapter is linear in R, and r^2 numbers of a layer travel, so that
    r can be large. B = U and A = V^T are the r leading singular vectors of the frozen weight, which every client has
    (as in LoRA-XS, 2405.17604); the paper takes those of a first gradient instead, which costs a round of its own.
    What lies outside these r directions can never be learned.

    Examples:
        >>> FedSB().trained(0)
        ('lora_R',)
    """

    name: ClassVar[str] = "fed-sb"

    def initial(self, adapter: Adapter, weight: Callable[[str], Tensor], rng: np.random.Generator) -> Adapter:
        tensors = {}
        for module in adapter.modules():
            u, _, vh = leading_directions(weight(module), adapter.rank, rng)
            tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = vh, u
            tensors[f"{module}.{CORE}.weight"] = torch.zeros(adapter.rank, adapter.rank)
        return adapter.with_tensors(tensors)

    def trained(self, round_index: int) -> Collection[str]:
        return (CORE,)

    def check(self, run: RunConfig) -> None:
        _needs_weights(self.name, run)


class TinyLoRA(FedIT):
    """Train and average a few numbers for many layers, W0 + s B (sum_i v_i P_i) A (2602.04118, as in PEFT).

    v <- sum_k p_k v_k from v = 0, exact: the adapter is linear in v [num_vectors, u]. B = U S^1/2 and A = S^1/2 V^T
    have the r leading singular values of the frozen weight, and each P_i is a fixed random r x r matrix with variance
    1/r, from the seed. Neighbouring layers share a vector; `num_vectors` = 1 ties all of them: u numbers are all that
    a client sends. More vectors than layers would be idle, so there are as many as layers at most.

    Examples:
        >>> TinyLoRA(u=13).num_vectors
        1
    """

    name: ClassVar[str] = "tinylora"
    u: int = Field(default=64, ge=1)
    num_vectors: int = Field(default=1, ge=1)

    def initial(self, adapter: Adapter, weight: Callable[[str], Tensor], rng: np.random.Generator) -> Adapter:
        tensors, modules, rank = {}, adapter.modules(), adapter.rank
        for module in modules:
            u, s, vh = leading_directions(weight(module), rank, rng)
            tensors[f"{module}.lora_A.weight"] = s.sqrt()[:, None] * vh
            tensors[f"{module}.lora_B.weight"] = u * s.sqrt()
            drawn = rng.normal(scale=rank**-0.5, size=(self.u, rank, rank))
            tensors[f"{module}.lora_P.weight"] = torch.from_numpy(drawn).float()
        tensors[TIED] = torch.zeros(min(self.num_vectors, len(modules)), self.u)
        return adapter.with_tensors(tensors)

    def trained(self, round_index: int) -> Collection[str]:
        return (VECTORS,)

    def check(self, run: RunConfig) -> None:
        _needs_weights(self.name, run)


class FedKSeed(FedIT):
    """Tune without gradients, along directions that a few shared seeds draw (2312.06353).

    a <- sum_k p_k a_k for B = sum_j a_j z_j: exact, the adapter being linear in a [seeds]. A step measures the slope
    along one direction by two losses, so a client has moved one number a step: that number and its place travel, both
    ways. No backward pass, so no activations are kept; in return a step tells little, and many are needed. A is frozen
    where it was drawn (the paper moves the weights themselves). Needs SGD; without a clip, or with one of the slope.

    Examples:
        >>> FedKSeed().trained(0)
        ('lora_a',)
    """

    name: ClassVar[str] = "fedkseed"
    sparse: ClassVar[bool] = True
    seeds: int = Field(default=1024, ge=1)

    def initial(self, adapter: Adapter, weight: Callable[[str], Tensor], rng: np.random.Generator) -> Adapter:
        # Below 2^31, so that they survive where all tensors are floating-point numbers for a while.
        seeds = torch.from_numpy(rng.integers(0, 2**31, self.seeds))
        return adapter.with_tensors({**adapter.tensors, ALONG: torch.zeros(self.seeds), SEEDS: seeds})

    def trained(self, round_index: int) -> Collection[str]:
        return (AMOUNTS,)

    def check(self, run: RunConfig) -> None:
        client = run.client
        if client.optimizer != "sgd" or client.weight_decay or run.objective.name != "plain":
            raise ConfigError(
                f"[aggregation] name = {self.name!r} moves one number of many in a step. Use [client] optimizer = "
                '"sgd", weight_decay = 0 and [objective] name = "plain".'
            )


def leading_directions(weight: Tensor, rank: int, rng: np.random.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return U [m, r], S [r] and V^T [r, n] of a weight [m, n] by randomised subspace iteration (0909.4061).

    On the CPU; directions beyond m or n are zero.
    """
    size = min(*weight.shape, rank)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**62)))
        u, s, v = torch.svd_lowrank(weight.cpu().double(), min(*weight.shape, 2 * rank + 8), niter=8)
    directions = torch.zeros(len(weight), rank), torch.zeros(rank), torch.zeros(rank, weight.shape[1])
    directions[0][:, :size], directions[1][:size], directions[2][:size] = u[:, :size], s[:size], v.T[:size]
    return directions


def _needs_weights(name: str, run: RunConfig) -> None:
    if run.model.quantization != "none":
        raise ConfigError(
            f"[aggregation] name = {name!r} starts from the singular vectors of the base's weights, which [model] "
            f"quantization = {run.model.quantization!r} does not have. Leave quantization out, or use ffa-lora."
        )
