"""The server: federated averaging of client updates, round by round (Algorithm 1 of 2305.05644).

It sees adapters, never data: this module can import nothing that reads rows or runs the model.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from fedit.codec import download_codec
from fedit.cohort import client_rank, participation, sample_cohort
from fedit.config import RunConfig
from fedit.interfaces import (
    FACTORS,
    Adapter,
    Aggregate,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    Engine,
    RoundError,
    derive_rng,
)
from fedit.lowrank import LowRank
from fedit.own_privacy import USED_UP
from fedit.privacy import Mechanism, Noise, system_noise
from fedit.wire import side_tensors, wire_size

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class ServerState:
    """Everything that a resumed run needs."""

    round_index: int
    """Completed rounds."""
    adapter: Adapter
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)
    side_step_bytes: int = 0
    """What the last round added to the adapter's side, or put in its place, as a message."""
    download_error: Mapping[str, Tensor] = field(default_factory=dict)
    """What compressed messages to the clients have not told them yet, by tensor name."""
    messages: tuple[int, ...] = ()
    """The bytes of every round's compressed message to the clients; 0: it was not compressed, or there was none."""
    control: Mapping[str, Tensor] = field(default_factory=dict)
    """The mean of all clients' control variates, by tensor name."""
    step: bytes = b""
    """The last round's compressed message to the clients. It is not saved: who resumes sends the adapter whole."""
    clip_norm: float | None = None
    """Of the next round, where the clip norm adapts; None: as configured."""
    epsilon: float | None = None
    """The largest that clients' own noise has cost one of them so far"""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """Of the clients that gave up some of the rank that they began with."""


@dataclass(frozen=True)
class RoundRecord:
    """One line of rounds.jsonl: what happened in a round. Deterministic: times are kept elsewhere."""

    round: int
    """Counted from 1."""
    cohort: list[str]
    failures: dict[str, str]
    train_loss: float | None
    """Mean over the clients' local training losses, weighted by their tokens, nats; None: nobody was sampled."""
    update_norm: float
    """L2 norm of the step of the global adapter."""
    aggregation_loss: float | None
    bytes_up: int
    bytes_down: int
    """Sum over the cohort of the adapter files (safetensors, header included)."""
    tokens: int
    """That the shared adapter was trained on by all clients in this round, without padding."""
    ranks: Mapping[str, int] = field(default_factory=dict)
    """What clients of the cohort cut their adapters to in this round, where their objective does so."""
    epsilon: float | None = None
    """What the clients' privacy has cost after this round; None: they are given none."""
    clip_norm: float | None = None
    """L2 bound of this round's updates, where they are clipped for privacy"""
    test_loss: float | None = None
    """Of the new global adapter on the held-out rows, in the rounds that evaluate."""
    aggregation_s: float = field(default=0.0, compare=False)
    """What the aggregation took, without the time it waited for clients; the one number here that is not
    deterministic, and not written to rounds.jsonl."""

    def withheld(self) -> RoundRecord:
        """Return what may be told of a round whose clients have privacy: nothing exact of who came or what they had."""
        return replace(
            self,
            cohort=[],
            failures={},
            train_loss=None,
            update_norm=0.0,
            aggregation_loss=None,
            bytes_up=0,
            bytes_down=0,
            tokens=0,
        )


def train(
    config: RunConfig,
    engine: Engine,
    state: ServerState,
    finish_round: Callable[[ServerState, RoundRecord], None],
    noise: Callable[[int], Noise] = lambda round_index: system_noise,
) -> ServerState:
    """Run the rounds that `state` still lacks; `finish_round` evaluates and saves after each of them. With privacy they
    end before the one that would exceed the budget. `noise` gives a round's: what nobody can repeat, unless a
    simulation gives another.

    Raises:
        RoundError: a round got fewer than ``min_updates`` usable updates, or made an adapter that is not finite.
    """
    while state.round_index < config.rounds:
        mechanism = Mechanism.of(config, len(engine.clients()))
        if mechanism is not None and mechanism.exhausted(state.round_index):
            spent = mechanism.spent(state.round_index)
            log.warning("no round after %d: epsilon is %.2f, and another would exceed [privacy] target_epsilon = %g",
                        state.round_index, spent, mechanism.config.target_epsilon)  # fmt: skip
            break
        try:
            state, record = run_round(config, engine, state, noise(state.round_index))
        except BudgetUsedError as error:
            log.warning("%s", error)
            break
        finish_round(state, record)
    return state


class BudgetUsedError(RoundError):
    """Every client that was asked has used up its privacy budget: the run ends with what it has."""


def run_round(
    config: RunConfig, engine: Engine, state: ServerState, noise: Noise = system_noise
) -> tuple[ServerState, RoundRecord]:
    """Sample a cohort, let it tune, aggregate, move the global adapter. An empty cohort leaves everything as it is."""
    clients = engine.clients()
    mechanism = Mechanism.of(config, len(clients))
    cohort = sample_cohort(config, clients, state.round_index)
    if not cohort and mechanism is None:
        record = RoundRecord(state.round_index + 1, [], {}, None, 0.0, None, 0, 0, 0)
        return replace(state, round_index=state.round_index + 1, messages=(*state.messages, 0), step=b""), record
    history = participation(config, clients, state.round_index)
    epsilon = None if mechanism is None else mechanism.spent(state.round_index + 1)
    tasks = _tasks(config, clients, state, {client: len(history[client]) for client in cohort}, epsilon)
    shared = config.aggregation.shared(state.round_index)
    answers = _Answers(tasks, shared, config.objective.kept_rank, epsilon=state.epsilon)
    min_updates = config.cohort.min_updates if mechanism is None else 0
    updates = answers.updates(engine.run(tasks) if tasks else iter(()), min_updates)
    sees_each = mechanism is None and config.secure_sums is None
    clip_norm = next_clip_norm = None
    started = time.perf_counter()
    if mechanism is not None:
        clip_norm = mechanism.config.clip_norm if state.clip_norm is None else state.clip_norm
        mean, next_clip_norm = mechanism.mean(state.adapter, state.adapter.only(shared), updates, clip_norm, noise)
        updates = iter([mean])
    rng = derive_rng(config.seed, "aggregation", state.round_index)
    result = config.aggregation.aggregate(state.adapter, updates, rng)
    for _ in updates:  # what a rule leaves unread is counted all the same
        pass
    aggregation_s = time.perf_counter() - started - answers.waited_s
    adapter, optimizer_state = config.server_optimizer.apply(state.adapter, result.delta, state.optimizer_state)
    adapter = replace(adapter, side=next_side(state.adapter, result))
    adapter, download_error, step = _broadcast(config, state, adapter)
    update_norm = distance(adapter, state.adapter)
    if not math.isfinite(update_norm) or not _is_finite(side_tensors(adapter.side)):
        raise RoundError(
            f"Round {state.round_index + 1}: the new global adapter is not finite. Lower the rates of [client] or "
            "[server_optimizer]. The checkpoint of the round before is intact."
        )
    record = RoundRecord(
        round=state.round_index + 1,
        cohort=list(cohort),
        failures=answers.failures,
        train_loss=answers.loss_sum / max(1, answers.num_tokens),
        update_norm=update_norm,
        aggregation_loss=result.metrics.get("aggregation_loss") if sees_each else None,
        bytes_up=answers.bytes_up,
        bytes_down=sum(download_size(config, state, task, history[task.client]) for task in tasks),
        tokens=answers.num_tokens,
        ranks=answers.ranks,
        epsilon=answers.epsilon if epsilon is None else epsilon,
        clip_norm=clip_norm,
        aggregation_s=aggregation_s,
    )
    side_step_bytes = wire_size(side_tensors(result.side_step)) if result.side_step else 0
    messages = (*state.messages, len(step))
    control = _moved(state.control, answers.control_sum, 1 / len(clients))
    ranks = {**state.ranks, **answers.ranks}
    return ServerState(
        state.round_index + 1,
        adapter,
        optimizer_state,
        side_step_bytes,
        download_error,
        messages,
        control,
        step,
        next_clip_norm,
        answers.epsilon,
        ranks,
    ), record


def _tasks(
    config: RunConfig, clients: Mapping[str, int], state: ServerState, cohort: Mapping[str, int], epsilon: float | None
) -> list[ClientTask]:
    """Return what the clients of a cohort are asked, each of which took part so many times before."""
    ranks = {client: state.ranks.get(client, client_rank(config, clients, client)) for client in cohort}
    cut = {rank: state.adapter.cut(rank) for rank in dict.fromkeys(ranks.values())}
    tasks = []
    for client, num_earlier in cohort.items():
        adapter = cut[ranks[client]]
        step = state.step if adapter is state.adapter and not state.control else b""
        tasks.append(ClientTask(client, state.round_index, adapter, num_earlier, state.control, step, epsilon))
    return tasks


def _is_finite(tensors: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values())


def _upload_size(result: ClientUpdate) -> int:
    if result.num_bytes is not None:
        return result.num_bytes
    return wire_size(result.update.tensors) if result.message is None else len(result.message)


def _moved(tensors: Mapping[str, Tensor], steps: Mapping[str, Tensor], factor: float) -> Mapping[str, Tensor]:
    """Return ``tensors + factor steps``, float64 in between; tensors that are not there are zero."""
    if not steps:
        return tensors
    return {
        n: ((tensors[n].double() if n in tensors else 0) + factor * step.double()).float() for n, step in steps.items()
    }


def next_side(adapter: Adapter, result: Aggregate) -> dict[str, LowRank]:
    """Return what lies beside the adapter after the round, float32; modules that nothing was added to keep theirs."""
    side = {} if result.replaces_side else dict(adapter.side)
    for module, step in result.side_step.items():
        whole = (side[module] + step).compact() if module in side else step.compact()
        if whole.rank:
            side[module] = LowRank(whole.b.float(), whole.a.float())
    return side


def _broadcast(config: RunConfig, state: ServerState, adapter: Adapter) -> tuple[Adapter, Mapping[str, Tensor], bytes]:
    """Return the global adapter as clients will have it, what they were not told, and the message.

    Where messages to the clients are compressed, everybody's adapter, the server's too, moves by what they say.
    """
    codec = download_codec(config)
    if codec.is_plain:
        return adapter, {}, b""
    before = state.adapter.only(config.aggregation.returned(state.round_index))
    step = {name: adapter.tensors[name] - tensor for name, tensor in before.items()}
    sent = codec.send(step, state.download_error, state.round_index)
    moved = {name: tensor + sent.received[name] for name, tensor in before.items()}
    adapter = adapter.with_tensors({**adapter.tensors, **moved})
    return adapter, {**state.download_error, **sent.error}, sent.message


def download_size(config: RunConfig, state: ServerState, task: ClientTask, rounds: Sequence[int]) -> int:
    """Return the bytes that a client needs to have the adapter of its task: what changed since its last round.

    At its first contact it needs all that ever changes; what is frozen, or drawn anew, it draws from the seed. With
    compressed messages it draws the untrained adapter as well, and needs the messages since, or the adapter instead.
    """
    since = range(rounds[-1], task.round_index) if rounds else range(task.round_index + 1)
    factors = {factor for index in since for factor in config.aggregation.returned(index)}
    size = wire_size(task.adapter.only(factors))
    control = wire_size(task.control) if task.control else 0
    if not download_codec(config).is_plain:
        return min(size, sum(state.messages[rounds[-1] if rounds else 0 :])) + control
    if task.adapter.side:
        whole = wire_size(side_tensors(task.adapter.side))
        was_there = bool(rounds) and rounds[-1] == task.round_index - 1
        size += min(whole, state.side_step_bytes) if was_there else whole
    return size + control


@dataclass(eq=False)
class _Answers:
    """Lets the usable updates of a round through in client order and counts everything."""

    tasks: Sequence[ClientTask]
    shared: Collection[str]
    """The factors that clients send"""
    kept_rank: Callable[[int], int]
    """What a client may cut an adapter of a rank to"""
    failures: dict[str, str] = field(default_factory=dict)
    loss_sum: float = 0.0
    num_tokens: int = 0
    bytes_up: int = 0
    control_sum: Mapping[str, Tensor] = field(default_factory=dict)
    """Of the changes of the clients' control variates"""
    ranks: dict[str, int] = field(default_factory=dict)
    """Of the updates of a lower rank than was sent"""
    epsilon: float | None = None
    """The largest that clients' own noise has cost one of them, in earlier rounds too"""
    waited_s: float = 0.0
    """For the clients, while somebody asked for their updates"""

    def updates(self, results: Iterator[ClientUpdate | ClientFailure], min_updates: int) -> Iterator[ClientUpdate]:
        """Yield the usable updates; hold back only those that came before their turn.

        Raises:
            RoundError: fewer than `min_updates` were usable.
        """
        waiting: dict[str, ClientUpdate | ClientFailure] = {}
        num_usable = 0
        asked = time.perf_counter()
        merged: set[str] = set()
        for task in self.tasks:
            if task.client in merged:
                num_usable += task.client not in self.failures
                continue
            while task.client not in waiting and (result := next(results, None)) is not None:
                waiting[result.client] = result
            result = waiting.pop(task.client, ClientFailure(task.client, "no answer"))
            failure = result.reason if isinstance(result, ClientFailure) else self._unusable(task, result)
            others = () if isinstance(result, ClientFailure) else result.others
            merged |= set(others)
            if failure is not None:
                self.failures |= dict.fromkeys((task.client, *others), failure)
                continue
            assert isinstance(result, ClientUpdate)
            num_usable += 1
            if result.update.rank < task.adapter.rank:
                self.ranks[task.client] = result.update.rank
            self.loss_sum += result.loss * result.num_tokens
            self.num_tokens += result.num_tokens
            if result.epsilon is not None:
                self.epsilon = max(result.epsilon, self.epsilon or 0.0)
            if result.control_step:
                self.control_sum = _moved(self.control_sum, result.control_step, 1.0)
                self.bytes_up += wire_size(result.control_step)
            self.bytes_up += _upload_size(result)
            self.waited_s += time.perf_counter() - asked
            yield result
            asked = time.perf_counter()
        self.waited_s += time.perf_counter() - asked
        if self.failures and not num_usable and set(self.failures.values()) == {USED_UP}:
            raise BudgetUsedError(f"no round after {self.tasks[0].round_index}: of every client, {USED_UP}")
        if num_usable < min_updates:
            reasons = "; ".join(f"{client}: {reason}" for client, reason in self.failures.items())
            raise RoundError(
                f"Round {self.tasks[0].round_index + 1} got {num_usable} usable updates of {len(self.tasks)}, needs "
                f"[cohort] min_updates = {min_updates}. {reasons}. The checkpoint of the round before is intact."
            )

    def _unusable(self, task: ClientTask, result: ClientUpdate) -> str | None:
        kept_rank = self.kept_rank(task.adapter.rank)
        if result.update.rank == kept_rank:
            task = replace(task, adapter=task.adapter.cut(kept_rank))
        return unusable(task, result, self.shared)


def unusable(task: ClientTask, result: ClientUpdate, shared: Collection[str] = FACTORS) -> str | None:
    """Return why an update cannot be aggregated (names, shapes, values, counts), or None."""
    expected = {name: tensor.shape for name, tensor in task.adapter.only(shared).items()}
    got = {name: tensor.shape for name, tensor in result.update.tensors.items()}
    if got != expected:
        wrong = sorted(name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name))
        return f"the update is not shaped like the adapter that was sent ({len(wrong)} tensors, first {wrong[:2]})"
    sent, returned = ((adapter.rank, adapter.lora_alpha) for adapter in (task.adapter, result.update))
    if returned != sent:
        return f"the update has another scale: (rank, lora_alpha) {returned}, sent {sent}"
    if result.control_step and {n: t.shape for n, t in result.control_step.items()} != expected:
        return "the control variate is not shaped like the update"
    travelled = [*result.update.tensors.items(), *result.control_step.items()]
    broken = [name for name, tensor in travelled if not bool(torch.isfinite(tensor).all())]
    if broken:
        return f"the update is not finite ({len(broken)} tensors, first {broken[0]})"
    if not math.isfinite(result.loss):
        return f"the training loss is not finite: {result.loss}"
    if result.num_examples < 0 or result.num_tokens < 0:
        return f"negative counts: num_examples {result.num_examples}, num_tokens {result.num_tokens}"
    if result.num_steps < 1:
        return f"num_steps is {result.num_steps}: no update without a step"
    return None


def distance(left: Adapter, right: Adapter) -> float:
    """Return the L2 distance of two adapters' tensors."""
    squares = [(left.tensors[n].double() - right.tensors[n].double()).square().sum() for n in left.tensors]
    return float(torch.stack(squares).sum().sqrt())
