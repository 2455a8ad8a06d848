"""The optimizers of the clients in a stack: each slot has its own step count, learning rate and gradient clip."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fedit.config import ClientConfig
from fedit.core_stack import CoreStack
from fedit.interfaces import FACTORS
from fedit.model import StackedModel
from fedit.private_stack import PrivateStack
from fedit.seed_stack import SeedStack

Stack = StackedModel | CoreStack | SeedStack | PrivateStack
"""What an optimizer can move: slots with `parameters`, and gradients for them"""
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True, eq=False)
class Moments:
    """What AdamW remembers of a training; with it, and the adapter, the training goes on as if it had not stopped."""

    first: torch.Tensor
    """[d], of the stack's layout; so is `second`"""
    second: torch.Tensor
    num_steps: int


class StackedOptimizer:
    """AdamW (1711.05101) or SGD on every slot of a stack.

    One slot's numbers equal those of ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW`` or
    ``torch.optim.SGD``. What a local objective adds to the loss beside the rows' own is added to the gradient in front
    of the clip: ``pull / 2 ||x - anchor||^2``, ``<correction, x>``, and what `shrink` says.
    """

    def __init__(self, model: Stack, config: ClientConfig, trained: Collection[str] = FACTORS) -> None:
        self._model = model
        self._columns = model.columns(trained)
        self._config = config
        moments = model.parameters if config.optimizer == "adamw" else model.parameters[:, :0]
        self._first, self._second = torch.zeros_like(moments), torch.zeros_like(moments)
        self._steps = np.zeros(model.num_slots, dtype=np.int64)
        self._pulls = np.zeros(model.num_slots)
        self._anchors: torch.Tensor | None = None
        self._corrections: torch.Tensor | None = None
        self._shrinkages: dict[int, tuple[int, float]] = {}

    def start(self, slot: int, moments: Moments | None) -> None:
        """Give a slot the moments of an earlier training, or forget those that it has, and what was added."""
        self._first[slot] = 0 if moments is None else moments.first
        self._second[slot] = 0 if moments is None else moments.second
        self._steps[slot] = 0 if moments is None else moments.num_steps
        self._pulls[slot] = 0
        self._shrinkages.pop(slot, None)
        if self._corrections is not None:
            self._corrections[slot] = 0

    def pull(self, slot: int, anchor: torch.Tensor, strength: float) -> None:
        """Draw a slot to `anchor` [d] from now on."""
        if self._anchors is None:
            self._anchors = torch.zeros_like(self._model.parameters)
        self._anchors[slot] = anchor
        self._pulls[slot] = strength

    def correct(self, slot: int, correction: torch.Tensor) -> None:
        """Add `correction` [d] to every gradient of a slot from now on."""
        if self._corrections is None:
            self._corrections = torch.zeros_like(self._model.parameters)
        self._corrections[slot] = correction

    def shrink(self, slot: int, kept_rank: int, strength: float) -> None:
        """Add ``strength sum ||B'||_F ||A'||_F`` to a slot's loss from now on, of its components after `kept_rank`."""
        self._shrinkages[slot] = kept_rank, strength

    def moments(self, slot: int) -> Moments:
        """Return a copy of what a slot remembers; of SGD, nothing but its steps."""
        return Moments(self._first[slot].clone(), self._second[slot].clone(), int(self._steps[slot]))

    @torch.no_grad()
    def step(self, learning_rates: Mapping[int, float]) -> dict[int, float]:
        """Move the slots that have a learning rate along the model's gradients, and set these to zero.

        Returns:
            The gradient norm of each, before clipping.
        """
        norms = {}
        for slots in _runs(sorted(learning_rates)):
            members = range(slots.start, slots.stop)
            rates = np.asarray([learning_rates[slot] for slot in members])
            norms |= dict(zip(members, self._step_run(slots, rates), strict=True))
        return norms

    def _step_run(self, slots: slice, rates: np.ndarray) -> list[float]:
        gradients = self._model.take_gradients(slots)[:, self._columns]
        parameters = self._model.parameters[slots, self._columns]
        if self._anchors is not None:
            gradients.add_((parameters - self._anchors[slots, self._columns]) * self._column(self._pulls[slots]))
        if self._corrections is not None:
            gradients.add_(self._corrections[slots, self._columns])
        for slot in range(slots.start, slots.stop):
            if slot in self._shrinkages:
                gradients[slot - slots.start].add_(self._shrinkage_gradient(slot)[self._columns])
        norms = gradients.norm(dim=1)
        if self._config.clip_norm is not None:
            gradients.mul_((self._config.clip_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        if self._config.weight_decay:
            parameters.mul_(self._column(1 - rates * self._config.weight_decay))
        self._steps[slots] += 1
        if self._config.optimizer == "adamw":
            self._move_by_adamw(slots, parameters, gradients, rates)
        else:
            parameters.sub_(gradients * self._column(rates))
        self._model.parameters_changed(slots)
        gradients.zero_()
        return norms.tolist()

    def _shrinkage_gradient(self, slot: int) -> torch.Tensor:
        """Return the gradient [d] of what `shrink` added; where a factor is zero, its own is taken as zero."""
        assert isinstance(self._model, StackedModel)
        kept_rank, strength = self._shrinkages[slot]
        gradient = torch.zeros_like(self._model.parameters[slot : slot + 1])
        parameters = self._model.views(self._model.parameters[slot : slot + 1])
        for (_, (a, b)), (_, (a_gradient, b_gradient)) in zip(parameters, self._model.views(gradient), strict=True):
            a_last, b_last = a[0, kept_rank:], b[0, :, kept_rank:]
            a_norm, b_norm = a_last.norm(), b_last.norm()
            smallest = torch.finfo(a_norm.dtype).tiny
            a_gradient[0, kept_rank:] = strength * b_norm * (a_last / a_norm.clamp(min=smallest))
            b_gradient[0, :, kept_rank:] = strength * a_norm * (b_last / b_norm.clamp(min=smallest))
        return gradient[0]

    def _move_by_adamw(
        self, slots: slice, parameters: torch.Tensor, gradients: torch.Tensor, rates: np.ndarray
    ) -> None:
        first, second = self._first[slots, self._columns], self._second[slots, self._columns]
        steps = self._steps[slots]
        first.lerp_(gradients, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        denominator = second.sqrt().div_(self._column(np.sqrt(1 - BETA2**steps))).add_(EPSILON)
        parameters.addcdiv_(first * self._column(-rates / (1 - BETA1**steps)), denominator)

    def _column(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._model.parameters)[:, None]


def _runs(slots: Sequence[int]) -> list[slice]:
    """Return slices of neighbours that cover the ascending `slots`: their rows of a stack are views of it."""
    starts = [slot for i, slot in enumerate(slots) if i == 0 or slots[i - 1] != slot - 1]
    ends = [slot + 1 for i, slot in enumerate(slots) if i + 1 == len(slots) or slots[i + 1] != slot + 1]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]
