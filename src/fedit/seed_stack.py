"""The stack of clients that tune without gradients: steps along directions that a few shared seeds draw.

All B of a client's adapter are sum_j a_j z_j for K directions z_j ~ N(0, I), each drawn anew from its seed whenever it
is needed; what is trained, and travels, is a [K]. A step draws one j and measures the slope along z_j by two losses,
(L(B + eps z_j) - L(B - eps z_j)) / (2 eps), which is the gradient of a_j (2312.06353). Each client has two of the
model's slots, one for either side.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

from fedit.adapter import ALONG, SEEDS, Adapter, direction
from fedit.interfaces import derive_rng
from fedit.model import StackedModel

EPSILON = 0.01
"""How far from B the losses are measured, in units of the directions (2305.17333 gives it for LoRA)."""


class SeedStack:
    """What an optimizer moves in place of a `StackedModel` when clients tune by seeds.

    A row of `parameters` [S, K] holds a client's a. `like` is an adapter with the seeds that all clients have.
    """

    def __init__(self, model: StackedModel, num_slots: int, like: Adapter) -> None:
        model.allocate(2 * num_slots, ())
        self._model = model
        self._seeds = [int(seed) for seed in like.tensors[SEEDS].tolist()]
        self._columns = model.columns(["lora_B"])
        self.parameters = model.parameters.new_zeros(num_slots, len(self._seeds))
        self._slopes = torch.zeros_like(self.parameters)
        self._done = torch.zeros_like(self.parameters)
        """The a that `_adapters` are made with"""
        self._adapters = model.parameters.new_zeros(num_slots, model.num_parameters)
        self._written: tuple[Adapter, Tensor] | None = None

    @property
    def num_slots(self) -> int:
        return len(self.parameters)

    def columns(self, factors: Collection[str]) -> slice:
        """Return the columns of `parameters` that are trained: all."""
        return slice(None)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy `adapter` into a slot."""
        if self._written is None or self._written[0] is not adapter:  # all clients of a round receive the same
            self._written = adapter, self._model.flat(adapter.plain().tensors, adapter.rank)
        self._adapters[slot] = self._written[1]
        self._model.scaling[2 * slot : 2 * slot + 2] = adapter.scaling
        self.parameters[slot] = self._done[slot] = self.flat(adapter.tensors, adapter.rank)

    def flat(self, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
        """Return a among `tensors` as a row [K] of `parameters`; zero where it is lacking."""
        return tensors.get(ALONG, torch.zeros(len(self._seeds))).to(self.parameters)

    def read(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a copy of a slot's a on the CPU."""
        return {ALONG: self.parameters[slot].cpu().float().clone()}

    @torch.no_grad()
    def parameters_changed(self, slots: slice = slice(None)) -> None:
        """Move the slots' adapters along the directions whose a has changed."""
        for slot in range(self.num_slots)[slots]:
            change = self.parameters[slot] - self._done[slot]
            for j in change.nonzero().flatten().tolist():
                self._adapters[slot, self._columns].add_(self._direction(j), alpha=float(change[j]))
        self._done[slots] = self.parameters[slots]

    def take_gradients(self, slots: slice = slice(None)) -> Tensor:
        """Return the slopes [S, K] that were measured; to be set to zero once used."""
        return self._slopes[slots]

    @torch.no_grad()
    def perturb(self, seeds: Mapping[int, int]) -> dict[int, int]:
        """Put the two sides of a step into the model, for slots with a seed of the step each; return their j."""
        chosen = {}
        for slot, seed in seeds.items():
            chosen[slot] = j = int(derive_rng(seed, "direction").integers(len(self._seeds)))
            for side, sign in ((2 * slot, 1), (2 * slot + 1, -1)):
                self._model.parameters[side] = self._adapters[slot]
                self._model.parameters[side, self._columns].add_(self._direction(j), alpha=sign * EPSILON)
            self._model.parameters_changed(slice(2 * slot, 2 * slot + 2))
        return chosen

    def measured(self, chosen: Mapping[int, int], losses: Mapping[int, float]) -> dict[int, float]:
        """Note the slopes, given the losses of the model's slots; return the mean of each client's two losses."""
        means = {}
        for slot, j in chosen.items():
            plus, minus = losses[2 * slot], losses[2 * slot + 1]
            self._slopes[slot, j] = (plus - minus) / (2 * EPSILON)
            means[slot] = (plus + minus) / 2
        return means

    def _direction(self, j: int) -> Tensor:
        size = self._adapters[0, self._columns].numel()
        return torch.from_numpy(direction(self._seeds[j], size)).to(self._adapters)


def both_sides(slots: Sequence[int]) -> list[int]:
    """Return the model's slots of rows that are there twice: all on the one side, then all on the other."""
    return [2 * slot + side for side in (0, 1) for slot in slots]
