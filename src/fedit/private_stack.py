"""The stack of clients that train with differential privacy of their rows (DP-SGD, 1607.00133).

A step draws each row of a client by itself with probability q, clips the gradient of each to C, adds them up with noise
of standard deviation z C, and divides by the q n rows that are expected. Gradients of single rows cost no passes of
their own: each piece of a batch adds its part to its row in place of its slot.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fedit.adapter import Adapter
from fedit.core_stack import CoreStack
from fedit.model import StackedModel
from fedit.privacy import Draws

ROW_BYTES = 256_000_000
"""What the gradients of single rows take at a time, about at most."""
MOST_ROWS = 64


@dataclass(frozen=True)
class RowPrivacy:
    """What a client's steps do for the privacy of its rows."""

    clip_norm: float
    """L2 bound C of a row's gradient"""
    noise_multiplier: float
    """z"""
    share: float
    """q: the probability that a step draws a row"""
    draws: Draws
    num_expected: float
    """q n"""


class PrivateStack:
    """What an optimizer moves in place of `inner`: its slots, with gradients that are clipped row by row, and noisy."""

    def __init__(self, model: StackedModel, inner: StackedModel | CoreStack, trained: Collection[str]) -> None:
        self._inner = inner
        self._columns = inner.columns(trained)
        row_bytes = model.num_parameters * model.parameters.element_size()
        self.max_rows = max(1, min(MOST_ROWS, ROW_BYTES // row_bytes))
        """Rows whose gradients are kept at a time"""
        model.collect_by_row(self.max_rows, trained if isinstance(inner, StackedModel) else ("lora_B",))
        self._sums = torch.zeros_like(inner.parameters)
        self._is_there = torch.zeros_like(inner.parameters)
        """1 where a slot's adapter has a number, 0 where a larger rank would have one"""
        self._clip_norms = inner.parameters.new_full((inner.num_slots, 1), math.inf)
        self._privacy: dict[int, tuple[RowPrivacy, str]] = {}
        self._steps: dict[int, int] = {}

    @property
    def parameters(self) -> Tensor:
        return self._inner.parameters

    @property
    def num_slots(self) -> int:
        return self._inner.num_slots

    def columns(self, factors: Collection[str]) -> slice:
        """Return the columns of `parameters` that hold some of the factors."""
        return self._inner.columns(factors)

    def write(self, slot: int, adapter: Adapter) -> None:
        """Copy `adapter` into a slot."""
        self._inner.write(slot, adapter)

    def flat(self, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
        """Return tensors of an adapter as one row of `parameters`."""
        return self._inner.flat(tensors, rank)

    def read(self, slot: int, rank: int) -> dict[str, Tensor]:
        """Return a copy of a slot's tensors on the CPU."""
        return self._inner.read(slot, rank)

    def parameters_changed(self, slots: slice = slice(None)) -> None:
        """Bring the layers up to date with `parameters`."""
        self._inner.parameters_changed(slots)

    def start(self, slot: int, privacy: RowPrivacy, client: str, first_step: int, adapter: Adapter) -> None:
        """Let a slot train `adapter` for a client, from its step `first_step` on."""
        self._privacy[slot], self._steps[slot] = (privacy, client), first_step
        self._clip_norms[slot] = privacy.clip_norm
        ones = {name: torch.ones_like(tensor) for name, tensor in adapter.tensors.items()}
        self._is_there[slot] = self._inner.flat(ones, adapter.rank)

    def begin_step(self, slots: Collection[int]) -> None:
        """Forget what was added for `slots`: a step that did not fit the memory is done again from its start."""
        self._sums[list(slots)] = 0

    @torch.no_grad()
    def add_rows(self, slots: Sequence[int]) -> None:
        """Add the clipped gradients of the rows of the last pass to those of their `slots`."""
        rows = slice(0, len(slots))
        taken = self._inner.take_gradients(rows)
        gradients = taken[:, self._columns]
        of_row = torch.as_tensor(slots, device=gradients.device)
        norms = gradients.norm(dim=1, keepdim=True)
        # A row whose gradient is not finite counts for nothing: that its client failed would tell of this one row.
        gradients = torch.where(norms.isfinite(), gradients, 0.0)
        factors = (self._clip_norms[of_row] / norms).clamp(max=1.0)
        factors = torch.where(norms.isfinite() & (norms > 0), factors, 0.0)
        chosen = torch.zeros(self.num_slots, len(slots), dtype=gradients.dtype, device=gradients.device)
        chosen[of_row, torch.arange(len(slots), device=of_row.device)] = factors[:, 0]
        self._sums[:, self._columns] += chosen @ gradients
        taken.zero_()

    def take_gradients(self, slots: slice = slice(None)) -> Tensor:
        """Return the noisy means [S, d] of the clipped gradients, to be set to zero once used."""
        for slot in range(*slots.indices(self.num_slots)):
            privacy, client = self._privacy[slot]
            sums = self._sums[slot, self._columns]
            noise = privacy.draws.normal((len(sums),), client, self._steps[slot])
            size = privacy.noise_multiplier * privacy.clip_norm
            sums += size * torch.from_numpy(noise).to(sums) * self._is_there[slot, self._columns]
            sums /= privacy.num_expected
            self._steps[slot] += 1
        return self._sums[slots]
