"""Adapters: the LoRA tensors of all adapted layers, and what they add to the base.

A tensor is named as PEFT names it, without PEFT's prefix: ``<module>.lora_A.weight`` is A [r, n] and
``<module>.lora_B.weight`` is B [m, r] for a linear layer of n inputs and m outputs. The adapted layer computes
``W0 x + (lora_alpha / rank) B A x``.

Some rules freeze A and B and train a core R [r, r] between them, ``(lora_alpha / rank) B R A x``: the tensor
``<module>.lora_R.weight`` itself, or R = sum_i v_i P_i of the fixed ``<module>.lora_P.weight`` [u, r, r] and a row v of
the vectors ``tied.lora_v.weight`` [groups, u], each of which serves neighbouring modules. Others train how far B goes
along random directions, B + sum_j a_j z_j: a [K] is ``tied.lora_a.weight``, and z_j drawn from the j-th of the seeds in
``tied.lora_seeds.weight``.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

    from fedit.lowrank import LowRank

FACTORS = ("lora_A", "lora_B")
CORE, VECTORS = "lora_R", "lora_v"
TIED = f"tied.{VECTORS}.weight"
AMOUNTS = "lora_a"
ALONG, SEEDS = f"tied.{AMOUNTS}.weight", "tied.lora_seeds.weight"


def factor_of(name: str) -> str:
    """Return which factor a tensor is, e.g. ``lora_B`` for ``model.layers.0.q_proj.lora_B.weight``."""
    return name.rsplit(".", 2)[-2]


@dataclass(frozen=True, slots=True, eq=False)
class Adapter:
    """LoRA tensors (float32, CPU) by name; also the shape of an update, the difference of two adapters."""

    tensors: Mapping[str, Tensor]
    rank: int
    lora_alpha: float
    side: Mapping[str, LowRank] = field(default_factory=dict)
    """What rules that keep more than `rank` components leave beside it, by module: a frozen change of the base, which
    is never folded into the weights (in bfloat16 they would swallow small steps). The adapted layer adds its product,
    without a scaling. Empty for most rules."""

    @property
    def scaling(self) -> float:
        return self.lora_alpha / self.rank

    def modules(self) -> list[str]:
        """The adapted linear layers, in order."""
        return [name.removesuffix(".lora_A.weight") for name in self.tensors if name.endswith(".lora_A.weight")]

    def cut(self, rank: int) -> Adapter:
        """Return the first `rank` components, rescaled so that they do the same under ``lora_alpha / rank``."""
        if rank == self.rank:
            return self
        factor = (rank / self.rank) ** 0.5
        tensors = {
            name: factor * (tensor[:rank] if name.endswith(".lora_A.weight") else tensor[:, :rank])
            for name, tensor in self.tensors.items()
        }
        return Adapter(tensors, rank, self.lora_alpha, self.side)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> Adapter:
        return Adapter(tensors, self.rank, self.lora_alpha, self.side)

    @property
    def is_plain(self) -> bool:
        """Whether A and B are all."""
        return all(factor_of(name) in FACTORS for name in self.tensors)

    def plain(self) -> Adapter:
        """Return the same adapter as A and B alone: with a core, B R in place of B; with directions, B along them."""
        if self.is_plain:
            return self
        cores, tensors = cores_of(self.tensors), self.only(FACTORS)
        if ALONG in self.tensors:
            tensors |= moved_along(self.only(["lora_B"]), self.tensors[ALONG], self.tensors[SEEDS].tolist())
        for module, core in cores.items():
            tensors[f"{module}.lora_B.weight"] = tensors[f"{module}.lora_B.weight"].to(core) @ core
        return self.with_tensors(tensors)

    def only(self, factors: Collection[str]) -> dict[str, Tensor]:
        """Return the tensors of some factors."""
        return {name: tensor for name, tensor in self.tensors.items() if factor_of(name) in factors}


def cores_of(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return R [r, r] by module, of an adapter that has cores; else nothing."""
    ending = f".{CORE}.weight"
    cores = {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}
    if TIED in tensors:
        vectors, ending = tensors[TIED], ".lora_P.weight"
        fixed = {name.removesuffix(ending): tensor for name, tensor in tensors.items() if name.endswith(ending)}
        for group, (module, matrices) in zip(groups(len(fixed), len(vectors)), fixed.items(), strict=True):
            cores[module] = (vectors[group][:, None, None] * matrices.to(vectors)).sum(dim=0)
    return cores


def moved_along(tensors: Mapping[str, Tensor], amounts: Tensor, seeds: Sequence[int]) -> dict[str, Tensor]:
    """Return tensors moved by ``sum_j a_j z_j``, z_j being one vector over all of them."""
    moved = {name: tensor.to(amounts) for name, tensor in tensors.items()}
    for j in amounts.nonzero().flatten().tolist():
        whole = direction(int(seeds[j]), sum(tensor.numel() for tensor in moved.values()))
        parts = np.split(whole, np.cumsum([tensor.numel() for tensor in moved.values()])[:-1])
        for (name, tensor), part in zip(moved.items(), parts, strict=True):
            moved[name] = tensor + amounts[j] * amounts.new_tensor(part.reshape(tensor.shape))
    return moved


def direction(seed: int, size: int) -> np.ndarray:
    """Return the direction that a seed draws: standard normal, float32 [size], the same bits on every machine."""
    return np.random.default_rng(seed).standard_normal(size, dtype=np.float32)


def groups(num_modules: int, num_vectors: int) -> list[int]:
    """Return which vector each module has: neighbours share one, the last ones the last (as in PEFT's TinyLoRA)."""
    size = max(1, num_modules // num_vectors)
    return [min(index // size, num_vectors - 1) for index in range(num_modules)]
