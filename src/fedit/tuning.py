"""Local tuning of many clients at once on the one resident base.

A step takes the next batch of every live slot, puts the rows of all of them through the base together, in as few packed
sequences as memory and caches allow, adds up the gradients, and moves every slot by its own AdamW step. The loss of a
slot is the mean over the response tokens of its own batch, and rows do not see each other, so each client's gradients
are exactly those of tuning it alone. A finished slot is refilled with the next task.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedit.config import ClientConfig
from fedit.interfaces import Adapter, EncodedExample, derive_rng, derive_seed
from fedit.model import StackedModel

BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8


@dataclass(frozen=True, eq=False)
class Moments:
    """What AdamW remembers of a training; with it, and the adapter, the training goes on as if it had not stopped."""

    first: torch.Tensor
    """[d], of the stack's layout; so is `second`"""
    second: torch.Tensor
    num_steps: int


@dataclass(frozen=True, eq=False)
class TuningTask:
    """Steps [first_step, first_step + num_steps) of a training of total_steps, which set the learning rate."""

    name: str
    examples: Sequence[EncodedExample]
    adapter: Adapter
    """Where the steps start from."""
    first_step: int
    num_steps: int
    total_steps: int
    seed: int
    first_batch: int = 0
    """Where in its walk through the rows the client stands: with a sampled cohort it has taken fewer steps."""
    moments: Moments | None = None
    """AdamW's at the first step; None: it starts afresh, as a federated client does in every round."""


@dataclass(frozen=True, eq=False)
class TuningResult:
    """A finished task. `failure` says why there is no usable adapter."""

    task: TuningTask
    adapter: Adapter
    loss: float
    """Mean over the steps of the mean loss per response token, nats."""
    num_tokens: int
    """Trained on, without padding."""
    moments: Moments
    failure: str | None = None


@dataclass(eq=False)
class _Slot:
    """A place in the stack and the task that it trains."""

    index: int
    task: TuningTask
    step: int = 0
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0


def tune(
    model: StackedModel,
    tasks: Iterable[TuningTask],
    config: ClientConfig,
    num_slots: int,
    on_step: Callable[[int], None] = lambda num_tokens: None,
) -> Iterator[TuningResult]:
    """Yield the result of every task as it finishes, training up to `num_slots` of them at the same time.

    Overwrites the model's slots. `on_step` is told the tokens of each step. A task whose loss or gradient is not finite
    ends as a failure; the others are not touched by it.
    """
    queue = iter(tasks)
    model.allocate(num_slots)
    optimizer = StackedAdamW(model, config)
    free, live = list(range(num_slots)), list[_Slot]()
    while True:
        while free and (task := next(queue, None)) is not None:
            slot = _Slot(free.pop(0), task)
            model.write(slot.index, task.adapter)
            optimizer.start(slot.index, task.moments)
            live.append(slot)
        if not live:
            return
        finite = _step(model, optimizer, live, config, on_step)
        for slot, healthy in zip(list(live), finite, strict=True):
            if healthy and slot.step < slot.task.num_steps:
                continue
            live.remove(slot)
            free.append(slot.index)
            yield _finish(model, optimizer, slot, healthy)


def _step(
    model: StackedModel,
    optimizer: StackedAdamW,
    live: Sequence[_Slot],
    config: ClientConfig,
    on_step: Callable[[int], None],
) -> list[bool]:
    """Train one step of every live slot; return which of them stayed finite."""
    rows, examples, seeds = list[int](), list[EncodedExample](), list[int]()
    num_supervised = np.zeros(model.num_slots)
    for slot in live:
        step = slot.task.first_batch + slot.step
        for position, index in enumerate(
            batch_indices(len(slot.task.examples), config.batch_size, step, slot.task.seed)
        ):
            example = slot.task.examples[index]
            rows.append(slot.index)
            examples.append(example)
            seeds.append(derive_seed(slot.task.seed, "dropout", step, position) if model.dropout else 0)
            num_supervised[slot.index] += example.num_supervised
            slot.num_tokens += len(example)
    weights = 1 / np.maximum(num_supervised, 1)
    losses, reason = None, ""
    try:
        losses = _add_gradients(model, rows, examples, seeds, weights)
    except torch.OutOfMemoryError as error:
        reason = str(error)
    if losses is None:  # not in the handler: there, the error keeps the tensors of the failed pass alive
        model.halve_batches(reason)
        losses = _add_gradients(model, rows, examples, seeds, weights)
    mean_losses = (losses * weights).tolist()
    norms = optimizer.step({slot.index: _learning_rate(config, slot) for slot in live})
    on_step(sum(len(example) for example in examples))
    for slot in live:
        slot.step += 1
        slot.losses.append(mean_losses[slot.index])
    return [math.isfinite(mean_losses[slot.index]) and math.isfinite(norms[slot.index]) for slot in live]


def _add_gradients(
    model: StackedModel,
    slots: Sequence[int],
    examples: Sequence[EncodedExample],
    seeds: Sequence[int],
    weights: np.ndarray,
) -> np.ndarray:
    """Backpropagate the loss of every example's tokens times its slot's weight; return each slot's summed loss [S]."""
    losses = torch.zeros_like(model.scaling)
    weight_of_slot = torch.from_numpy(weights).to(model.scaling)
    for part, batch in model.batches(examples, slots, seeds):
        token_losses, row = model.token_losses(batch)
        slot_of_token = torch.as_tensor([slots[i] for i in part], device=model.device)[row]
        (token_losses * weight_of_slot[slot_of_token]).sum().backward()
        losses.index_add_(0, slot_of_token, token_losses.detach())
    return losses.cpu().numpy()


def _finish(model: StackedModel, optimizer: StackedAdamW, slot: _Slot, healthy: bool) -> TuningResult:
    task = slot.task
    failure = None
    if not healthy:
        what = "loss" if not math.isfinite(slot.losses[-1]) else "gradient"
        failure = f"{what} is not finite at step {task.first_step + slot.step}; lower [client] learning_rate"
    adapter = task.adapter.with_tensors(model.read(slot.index, task.adapter.rank))
    moments = optimizer.moments(slot.index)
    return TuningResult(task, adapter, float(np.mean(slot.losses)), slot.num_tokens, moments, failure)


# ---------------------------------------------------------------------------------------------------------- batches


def batch_indices(num_examples: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """Return the rows of a client's batch at `step` of its whole training.

    A client walks through its rows in a new order in each pass (the last batch of a pass may be smaller) and goes on in
    the next round where it stopped: nothing but the step number decides, so nothing has to be stored to resume.
    """
    steps_per_pass = -(-num_examples // batch_size)
    pass_index, batch_index = divmod(step, steps_per_pass)
    order = derive_rng(seed, "order", pass_index).permutation(num_examples)
    return order[batch_index * batch_size : (batch_index + 1) * batch_size]


def _learning_rate(config: ClientConfig, slot: _Slot) -> float:
    """Return the rate of the slot's next step: the schedule runs over the whole training, not over a round."""
    progress = (slot.task.first_step + slot.step) / slot.task.total_steps
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}
    return config.learning_rate * factor[config.schedule]


# -------------------------------------------------------------------------------------------------------- optimizer


class StackedAdamW:
    """AdamW (1711.05101) on every slot of a stack, each with its own step count, learning rate and gradient clip.

    One slot's numbers equal those of ``torch.nn.utils.clip_grad_norm_`` followed by ``torch.optim.AdamW``.
    """

    def __init__(self, model: StackedModel, config: ClientConfig) -> None:
        self._model = model
        self._weight_decay = config.weight_decay
        self._clip_norm = config.clip_norm
        self._first, self._second = torch.zeros_like(model.parameters), torch.zeros_like(model.parameters)
        self._steps = np.zeros(model.num_slots, dtype=np.int64)

    def start(self, slot: int, moments: Moments | None) -> None:
        """Give a slot the moments of an earlier training, or forget those that it has."""
        self._first[slot] = 0 if moments is None else moments.first
        self._second[slot] = 0 if moments is None else moments.second
        self._steps[slot] = 0 if moments is None else moments.num_steps

    def moments(self, slot: int) -> Moments:
        """Return a copy of what a slot remembers."""
        return Moments(self._first[slot].clone(), self._second[slot].clone(), int(self._steps[slot]))

    @torch.no_grad()
    def step(self, learning_rates: dict[int, float]) -> list[float]:
        """Move the slots that have a learning rate along the model's gradients, and set these to zero.

        Returns:
            Every slot's gradient norm before clipping.
        """
        gradients, parameters = self._model.take_gradients(), self._model.parameters
        live = sorted(learning_rates)
        self._steps[live] += 1
        norms = gradients.norm(dim=1)
        if self._clip_norm is not None:
            gradients.mul_((self._clip_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        self._first.lerp_(gradients, 1 - BETA1)
        self._second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        rates, steps = np.zeros(len(self._steps)), np.maximum(self._steps, 1)
        rates[live] = [learning_rates[slot] for slot in live]
        if self._weight_decay:
            parameters.mul_(self._column(1 - rates * self._weight_decay))
        denominator = self._second.sqrt().div_(self._column(np.sqrt(1 - BETA2**steps))).add_(EPSILON)
        parameters.addcdiv_(self._first * self._column(-rates / (1 - BETA1**steps)), denominator)
        self._model.parameters_changed()
        gradients.zero_()
        return norms.tolist()

    def _column(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._first)[:, None]
