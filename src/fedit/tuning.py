"""Local tuning of many clients at once on the one resident base.

A turn takes the next batch of as many live slots as one pass through the base holds, puts the rows of all of them
through it together, and moves each of these slots by its own AdamW step. The loss of a slot is the mean over the
response tokens of its own batch, and rows do not see each other, so each client's gradients are exactly those of tuning
it alone. A finished slot is refilled with the next task.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from fedit.config import ClientConfig
from fedit.core_stack import CoreStack
from fedit.interfaces import FACTORS, Adapter, EncodedExample, derive_rng, derive_seed
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
    batch: list[EncodedExample] = field(default_factory=list)
    """Of the step to come"""

    @property
    def batch_tokens(self) -> int:
        return sum(len(example) for example in self.batch)

    @property
    def steps_left(self) -> int:
        return self.task.num_steps - self.step

    def prepare(self, batch_size: int) -> None:
        """Take the next step's batch from the client's walk through its rows."""
        examples, step = self.task.examples, self.task.first_batch + self.step
        self.batch = [examples[i] for i in batch_indices(len(examples), batch_size, step, self.task.seed)]


def tune(
    model: StackedModel,
    tasks: Iterable[TuningTask],
    config: ClientConfig,
    num_slots: int,
    on_step: Callable[[int], None] = lambda num_tokens: None,
    trained: Collection[str] = FACTORS,
) -> Iterator[TuningResult]:
    """Yield the result of every task as it finishes, training up to `num_slots` of them at the same time.

    Only the factors in `trained` move. Overwrites the model's slots. `on_step` is told the tokens of each turn. A task
    whose loss or gradient is not finite ends as a failure; the others are not touched by it.

    Raises:
        EngineError: a task's adapter has another side than the first's; they share every pass through the base.
    """
    queue = iter(tasks)
    if (first := next(queue, None)) is None:
        return
    queue = itertools.chain([first], queue)
    stack: StackedModel | CoreStack = model
    if set(trained) <= set(FACTORS):
        model.allocate(num_slots, trained)
    else:
        stack = CoreStack(model, num_slots, first.adapter)
    optimizer = StackedAdamW(stack, config, trained)
    free, live = list(range(num_slots)), list[_Slot]()
    while True:
        while free and (task := next(queue, None)) is not None:
            slot = _Slot(free.pop(0), task)
            model.set_side(task.adapter.side, shared=bool(live))
            stack.write(slot.index, task.adapter)
            optimizer.start(slot.index, task.moments)
            slot.prepare(config.batch_size)
            live.append(slot)
        if not live:
            return
        turn = _take_turn(live, model.batch_tokens)
        finite = _step(model, optimizer, turn, config)
        on_step(sum(slot.batch_tokens for slot in turn))
        for slot, healthy in zip(turn, finite, strict=True):
            if healthy and slot.steps_left:
                slot.prepare(config.batch_size)
                continue
            live.remove(slot)
            free.append(slot.index)
            yield _finish(stack, optimizer, slot, healthy)


def _take_turn(live: Sequence[_Slot], limit: int) -> list[_Slot]:
    """Return the slots whose batches go through the base next, `limit` tokens of them, or one slot.

    Who has most steps left comes first: left to the end, its steps would follow one another alone. All come to their
    turn, since the others' steps left fall meanwhile.
    """
    turn, room = list[_Slot](), limit
    for slot in sorted(live, key=lambda slot: -slot.steps_left):
        if not turn or slot.batch_tokens <= room:
            turn.append(slot)
            room -= slot.batch_tokens
    return turn


def _step(model: StackedModel, optimizer: StackedAdamW, turn: Sequence[_Slot], config: ClientConfig) -> list[bool]:
    """Train one step of the slots of a turn; return which of them stayed finite."""
    rows, examples, seeds = list[int](), list[EncodedExample](), list[int]()
    num_supervised = np.zeros(model.num_slots)
    for slot in turn:
        step = slot.task.first_batch + slot.step
        for position, example in enumerate(slot.batch):
            rows.append(slot.index)
            examples.append(example)
            seeds.append(derive_seed(slot.task.seed, "dropout", step, position) if model.dropout else 0)
            num_supervised[slot.index] += example.num_supervised
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
    norms = optimizer.step({slot.index: _learning_rate(config, slot) for slot in turn})
    for slot in turn:
        slot.step += 1
        slot.num_tokens += slot.batch_tokens
        slot.losses.append(mean_losses[slot.index])
    return [math.isfinite(mean_losses[slot.index]) and math.isfinite(norms[slot.index]) for slot in turn]


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


def _finish(stack: StackedModel | CoreStack, optimizer: StackedAdamW, slot: _Slot, healthy: bool) -> TuningResult:
    task = slot.task
    failure = None
    if not healthy:
        what = "loss" if not math.isfinite(slot.losses[-1]) else "gradient"
        failure = f"{what} is not finite at step {task.first_step + slot.step}; lower [client] learning_rate"
    adapter = task.adapter.with_tensors({**task.adapter.tensors, **stack.read(slot.index, task.adapter.rank)})
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

    def __init__(
        self, model: StackedModel | CoreStack, config: ClientConfig, trained: Collection[str] = FACTORS
    ) -> None:
        self._model = model
        self._columns = model.columns(trained)
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
        first, second = self._first[slots, self._columns], self._second[slots, self._columns]
        self._steps[slots] += 1
        steps = self._steps[slots]
        norms = gradients.norm(dim=1)
        if self._clip_norm is not None:
            gradients.mul_((self._clip_norm / (norms + 1e-6)).clamp(max=1.0)[:, None])
        first.lerp_(gradients, 1 - BETA1)
        second.mul_(BETA2).addcmul_(gradients, gradients, value=1 - BETA2)
        if self._weight_decay:
            parameters.mul_(self._column(1 - rates * self._weight_decay))
        denominator = second.sqrt().div_(self._column(np.sqrt(1 - BETA2**steps))).add_(EPSILON)
        parameters.addcdiv_(first * self._column(-rates / (1 - BETA1**steps)), denominator)
        self._model.parameters_changed(slots)
        gradients.zero_()
        return norms.tolist()

    def _column(self, values: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(values).to(self._first)[:, None]


def _runs(slots: Sequence[int]) -> list[slice]:
    """Return slices of neighbours that cover the ascending `slots`: their rows of a stack are views of it."""
    starts = [slot for i, slot in enumerate(slots) if i == 0 or slots[i - 1] != slot - 1]
    ends = [slot + 1 for i, slot in enumerate(slots) if i + 1 == len(slots) or slots[i + 1] != slot + 1]
    return [slice(start, end) for start, end in zip(starts, ends, strict=True)]
