"""Adapters: the LoRA tensors of all adapted layers, and what they add to the base.

A tensor is named as PEFT names it, without PEFT's prefix: ``<module>.lora_A.weight`` is A [r, n] and
``<module>.lora_B.weight`` is B [m, r] for a linear layer of n inputs and m outputs. The adapted layer computes
``W0 x + (lora_alpha / rank) B A x``.

Some rules freeze A and B and train a core R [r, r] between them, ``(lora_alpha / rank) B R A x``: the tensor
``<module>.lora_R.weight`` itself, or R = sum_i v_i P_i of the fixed ``<module>.lora_P.weight`` [u, r, r] and a row v of
the vectors ``tied.lora_v.weight`` [groups, u], each of which serves neighbouring modules.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from fedit.lowrank import LowRank

FACTORS = ("lora_A", "lora_B")
CORE, VECTORS = "lora_R", "lora_v"
TIED = f"tied.{VECTORS}.weight"


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

    def plain(self) -> Adapter:
        """Return the same adapter as A and B alone: with a core, B R in place of B."""
        cores = cores_of(self.tensors)
        if not cores:
            return self
        tensors = self.only(FACTORS)
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


def groups(num_modules: int, num_vectors: int) -> list[int]:
    """Return which vector each module has: neighbours share one, the last ones the last (as in PEFT's TinyLoRA)."""
    size = max(1, num_modules // num_vectors)
    return [min(index // size, num_vectors - 1) for index in range(num_modules)]
