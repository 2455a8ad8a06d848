"""Local tuning of many clients at once on the one resident base.

A turn takes the next batch of as many live slots as one pass through the base holds, puts the rows of all of them
through it together, and moves each of these slots by a step of its own optimizer. The loss of a slot is the mean over
the response tokens of its own batch, and rows do not see each other, so each client's gradients are exactly those of
tuning it alone. A finished slot is refilled with the next task.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch

from fedit.adapter import AMOUNTS
from fedit.config import ClientConfig
from fedit.core_stack import CoreStack
from fedit.interfaces import FACTORS, Adapter, EncodedExample, Objective, derive_rng, derive_seed
from fedit.model import StackedModel
from fedit.optimizer import Moments, Stack, StackedOptimizer
from fedit.private_stack import PrivateStack, RowPrivacy
from fedit.seed_stack import SeedStack, both_sides

_PLAIN = Objective()
"""The mean loss per response token"""


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
    anchor: Mapping[str, torch.Tensor] | None = None
    """Tensors by name that the training is drawn to, ``pull / 2 ||x - anchor||^2``"""
    pull: float = 0.0
    correction: Mapping[str, torch.Tensor] | None = None
    """Tensors by name that are added to every gradient (control variates)"""
    privacy: RowPrivacy | None = None
    """What hides single rows; all tasks that are trained together have it, or none."""


@dataclass(frozen=True, eq=False)
class TuningResult:
    """A finished task. `failure` says why there is no usable adapter."""

    task: TuningTask
    adapter: Adapter
    loss: float
    """Mean over the steps of the mean loss per response token, nats."""
    num_tokens: int
    """Trained on, without padding."""
    moments: Moments | None
    """None where nobody wants them, which take twice the memory of the adapter"""
    rate_sum: float = 0.0
    """Of the learning rates of all steps"""
    failure: str | None = None


@dataclass(eq=False)
class _Slot:
    """A place in the stack and the task that it trains."""

    index: int
    task: TuningTask
    step: int = 0
    losses: list[float] = field(default_factory=list)
    num_tokens: int = 0
    rate_sum: float = 0.0
    batch: list[EncodedExample] = field(default_factory=list)
    """Of the step to come"""

    @property
    def batch_tokens(self) -> int:
        return sum(len(example) for example in self.batch)

    @property
    def steps_left(self) -> int:
        return self.task.num_steps - self.step

    def prepare(self, batch_size: int, objective: Objective) -> None:
        """Take the next step's batch from the client's walk through its rows."""
        examples, step, privacy = self.task.examples, self.task.first_batch + self.step, self.task.privacy
        if privacy is None:
            chosen = batch_indices(len(examples), batch_size, step, self.task.seed)
        else:
            drawn = privacy.draws.uniform(len(examples), self.task.name, self.task.first_step + self.step)
            chosen = np.flatnonzero(drawn < privacy.share)
        self.batch = [examples[i] for i in chosen.tolist()]
        if objective.preferences:
            self.batch += [example.rejected for example in self.batch if example.rejected is not None]


def tune(
    model: StackedModel,
    tasks: Iterable[TuningTask],
    config: ClientConfig,
    num_slots: int,
    on_step: Callable[[int], None] = lambda num_tokens: None,
    trained: Collection[str] = FACTORS,
    objective: Objective = _PLAIN,
    *,
    keep_moments: bool = True,
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
    stack = _stack_for(model, num_slots, trained, first)
    optimizer = StackedOptimizer(stack, config, trained)
    free, live = list(range(num_slots)), list[_Slot]()
    while True:
        while free and (task := next(queue, None)) is not None:
            slot = _Slot(free.pop(0), task)
            model.set_side(task.adapter.side, shared=bool(live))
            _begin(slot, stack, optimizer, objective)
            slot.prepare(config.batch_size, objective)
            live.append(slot)
        if not live:
            return
        turn = _take_turn(live, model.batch_tokens)
        finite = _step(model, stack, optimizer, turn, config, objective)
        on_step(sum(slot.batch_tokens for slot in turn))
        for slot, healthy in zip(turn, finite, strict=True):
            if healthy and slot.steps_left:
                slot.prepare(config.batch_size, objective)
                continue
            live.remove(slot)
            free.append(slot.index)
            yield _finish(stack, slot, healthy, optimizer.moments(slot.index) if keep_moments else None)


def _stack_for(model: StackedModel, num_slots: int, trained: Collection[str], first: TuningTask) -> Stack:
    """Return empty slots for the factors that tasks like `first` train."""
    if AMOUNTS in trained:
        return SeedStack(model, num_slots, first.adapter)
    stack: StackedModel | CoreStack = model
    if set(trained) <= set(FACTORS):
        model.allocate(num_slots, trained if first.privacy is None else ())
    else:
        stack = CoreStack(model, num_slots, first.adapter)
    return stack if first.privacy is None else PrivateStack(model, stack, trained)


def _begin(slot: _Slot, stack: Stack, optimizer: StackedOptimizer, objective: Objective) -> None:
    """Put a slot's task into the stack, and what is added to its gradients."""
    task = slot.task
    stack.write(slot.index, task.adapter)
    optimizer.start(slot.index, task.moments)
    if task.anchor is not None:
        optimizer.pull(slot.index, stack.flat(task.anchor, task.adapter.rank), task.pull)
    if task.correction is not None:
        optimizer.correct(slot.index, stack.flat(task.correction, task.adapter.rank))
    if isinstance(stack, PrivateStack):
        assert task.privacy is not None
        stack.start(slot.index, task.privacy, task.name, task.first_step, task.adapter)
    if objective.shrinkage:
        optimizer.shrink(slot.index, objective.kept_rank(task.adapter.rank), objective.shrinkage)


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


@dataclass(frozen=True, eq=False)
class _Rows:
    """The rows of a turn, slot by slot; of preferences, a slot's chosen rows and then its rejected ones."""

    slots: Sequence[int]
    examples: Sequence[EncodedExample]
    seeds: Sequence[int]
    """Of dropout"""


def _step(
    model: StackedModel,
    stack: Stack,
    optimizer: StackedOptimizer,
    turn: Sequence[_Slot],
    config: ClientConfig,
    objective: Objective,
) -> list[bool]:
    """Train one step of the slots of a turn; return which of them stayed finite."""
    slots, examples, seeds = list[int](), list[EncodedExample](), list[int]()
    for slot in turn:
        step = slot.task.first_batch + slot.step
        for position, example in enumerate(slot.batch):
            slots.append(slot.index)
            examples.append(example)
            seeds.append(derive_seed(slot.task.seed, "dropout", step, position) if model.dropout else 0)
    rows = _Rows(slots, examples, seeds)
    if isinstance(stack, SeedStack):
        seeds_of_step = {s.index: derive_seed(s.task.seed, "step", s.task.first_step + s.step) for s in turn}
        collect = partial(_measure_slopes, model, stack, rows, seeds_of_step)
    elif isinstance(stack, PrivateStack):
        collect = partial(_backpropagate_rows, model, stack, rows)
    elif objective.preferences:
        collect = partial(_backpropagate_preferences, model, rows, objective)
    else:
        collect = partial(_backpropagate_responses, model, rows)
    losses, reason = None, ""
    try:
        losses = collect()
    except torch.OutOfMemoryError as error:
        reason = str(error)
    if losses is None:  # not in the handler: there, the error keeps the tensors of the failed pass alive
        model.halve_batches(reason)
        losses = collect()
    rates = {slot.index: _learning_rate(config, slot) for slot in turn}
    norms = optimizer.step(rates)
    for slot in turn:
        slot.rate_sum += rates[slot.index]
        slot.step += 1
        slot.num_tokens += slot.batch_tokens
        if slot.batch:  # of rows that are drawn one by one there may be none
            slot.losses.append(losses[slot.index])
    return [math.isfinite(losses.get(slot.index, 0.0)) and math.isfinite(norms[slot.index]) for slot in turn]


def _backpropagate_responses(model: StackedModel, rows: _Rows) -> dict[int, float]:
    """Add the gradients of each slot's mean loss per response token; return these losses."""
    weights = _weights_of_means(rows)
    return _sum_by_slot(rows.slots, _response_losses(model, rows, weights) * weights)


def _backpropagate_rows(model: StackedModel, stack: PrivateStack, rows: _Rows) -> dict[int, float]:
    """Add each row's clipped gradient of its mean loss per response token; return the means of these losses, of those
    that are finite.
    """
    losses = np.zeros(len(rows.examples))
    stack.begin_step(set(rows.slots))
    for start in range(0, len(losses), stack.max_rows):
        few = slice(start, start + stack.max_rows)
        examples, slots = rows.examples[few], rows.slots[few]
        weight_of_row = torch.tensor([1 / max(1, example.num_supervised) for example in examples]).to(model.scaling)
        for part, batch in model.batches(examples, range(len(examples)), rows.seeds[few]):
            token_losses, row_in_part = model.token_losses(batch, slots)
            row = torch.as_tensor(part, device=model.device)[row_in_part]
            weighted = token_losses * weight_of_row[row]
            weighted.sum().backward()
            sums = torch.zeros_like(weight_of_row).index_add_(0, row, weighted.detach())
            losses[few] += sums.double().cpu().numpy()
        stack.add_rows(slots)
    counts = Counter(rows.slots)
    sums = _sum_by_slot(rows.slots, np.nan_to_num(losses, nan=0.0, posinf=0.0, neginf=0.0))
    return {slot: loss / counts[slot] for slot, loss in sums.items()}


def _weights_of_means(rows: _Rows) -> np.ndarray:
    """Return for each row one over its slot's response tokens, [rows]."""
    num_supervised: dict[int, int] = defaultdict(int)
    for slot, example in zip(rows.slots, rows.examples, strict=True):
        num_supervised[slot] += example.num_supervised
    return np.asarray([1 / max(1, num_supervised[slot]) for slot in rows.slots])


def _measure_slopes(
    model: StackedModel, stack: SeedStack, rows: _Rows, seeds_of_step: Mapping[int, int]
) -> dict[int, float]:
    """Measure each slot's slope along a direction by its losses on either side; return their means."""
    chosen = stack.perturb(seeds_of_step)
    twice = _Rows(both_sides(rows.slots), [*rows.examples, *rows.examples], [*rows.seeds, *rows.seeds])
    with torch.no_grad():
        losses = _response_losses(model, twice, None) * _weights_of_means(twice)
    return stack.measured(chosen, _sum_by_slot(twice.slots, losses))


def _backpropagate_preferences(model: StackedModel, rows: _Rows, objective: Objective) -> dict[int, float]:
    """Add the gradients of each slot's mean loss per pair of a chosen and a rejected row; return these losses.

    The loss is a function of each pair's margin, and the margin of the two rows' log-likelihoods. A pass without
    gradients tells the margins, and with them the weight of each row's loss in the pass with gradients.
    """
    with torch.no_grad():
        losses = _response_losses(model, rows, None)
    counts = Counter(rows.slots)
    is_chosen = np.concatenate([np.arange(count) < count // 2 for count in counts.values()])
    chosen, rejected = np.flatnonzero(is_chosen).tolist(), np.flatnonzero(~is_chosen).tolist()
    reference = np.asarray([rows.examples[row].reference_margin for row in chosen])
    margins = torch.from_numpy(losses[rejected] - losses[chosen] - reference).requires_grad_()
    pair_losses = objective.preference_loss(margins)
    (slopes,) = torch.autograd.grad(pair_losses.sum(), margins)
    share = np.asarray([2 / counts[rows.slots[row]] for row in chosen])
    weights = np.zeros(len(losses))
    weights[rejected] = slopes.numpy() * share
    weights[chosen] = -weights[rejected]
    _response_losses(model, rows, weights)
    return _sum_by_slot([rows.slots[row] for row in chosen], pair_losses.detach().numpy() * share)


def _response_losses(model: StackedModel, rows: _Rows, weights: np.ndarray | None) -> np.ndarray:
    """Return the summed loss of each row's response tokens, nats [rows]; backpropagate it times its weight."""
    losses = torch.zeros(len(rows.examples), device=model.device, dtype=model.scaling.dtype)
    weight_of_row = None if weights is None else torch.from_numpy(weights).to(model.scaling)
    for part, batch in model.batches(rows.examples, rows.slots, rows.seeds):
        token_losses, row_in_part = model.token_losses(batch)
        row = torch.as_tensor(part, device=model.device)[row_in_part]
        if weight_of_row is not None:
            (token_losses * weight_of_row[row]).sum().backward()
        losses.index_add_(0, row, token_losses.detach())
    return losses.double().cpu().numpy()


def _sum_by_slot(slots: Sequence[int], values: np.ndarray) -> dict[int, float]:
    sums: dict[int, float] = defaultdict(float)
    for slot, value in zip(slots, values.tolist(), strict=True):
        sums[slot] += value
    return sums


def _finish(stack: Stack, slot: _Slot, healthy: bool, moments: Moments | None) -> TuningResult:
    task = slot.task
    failure = None
    if not healthy:
        what = "loss" if slot.losses and not math.isfinite(slot.losses[-1]) else "gradient"
        failure = f"{what} is not finite at step {task.first_step + slot.step}; lower [client] learning_rate"
    adapter = task.adapter.with_tensors({**task.adapter.tensors, **stack.read(slot.index, task.adapter.rank)})
    loss = float(np.mean(slot.losses)) if slot.losses else 0.0
    return TuningResult(task, adapter, loss, slot.num_tokens, moments, slot.rate_sum, failure)


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
