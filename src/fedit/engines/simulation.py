"""The simulation engine: all clients in this process, tuned together on one resident base."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from fedit.codec import upload_codec
from fedit.config import RunConfig
from fedit.engines.client_store import ClientStore
from fedit.interfaces import (
    Adapter,
    ClientFailure,
    ClientTask,
    ClientUpdate,
    EncodedExample,
    Objective,
    derive_rng,
    derive_seed,
)
from fedit.model import StackedModel
from fedit.optimizer import Moments
from fedit.own_privacy import USED_UP, OwnPrivacy
from fedit.privacy import Draws, clip
from fedit.private_stack import RowPrivacy
from fedit.tuning import TuningResult, TuningTask, tune

PRIVATE, OWN, CONTROL, ERROR = "private/", "own/", "control/", "error/"
"""In front of names in a client's store: factors of its own; its own model, whole; its control variate; what its
messages have not told yet."""
OWN_MODEL_OF = "\x1fown model of\x1f"
"""In front of a client's name, in that of the task which trains its own model."""


class Simulation:
    """An `Engine` whose clients are lists of encoded examples; what they keep between rounds is in `store`."""

    def __init__(
        self,
        config: RunConfig,
        model: StackedModel,
        clients: Mapping[str, Sequence[EncodedExample]],
        store: ClientStore,
        on_step: Callable[[int], None] = lambda num_tokens: None,
        draws: Draws | None = None,
    ) -> None:
        """Make the engine of a run; `draws` is where clients that add noise have it from, the run's seed by default."""
        self._draws = Draws(derive_seed(config.seed, "privacy")) if draws is None else draws
        self._privacy = {client: OwnPrivacy.of(config, len(rows)) for client, rows in clients.items()}
        self._config = config
        self._model = model
        self._clients = clients
        self._store = store
        self._on_step = on_step
        attack = config.attack
        self._malicious = set() if attack is None else set(attack.malicious(list(clients), config.seed))

    def clients(self) -> Mapping[str, int]:
        return {client: len(examples) for client, examples in self._clients.items()}

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the clients' results as their slots finish; who has most steps begins first, or would end alone."""
        round_index = tasks[0].round_index
        tunings = {task.client: self._count(task) for task in tasks}
        spent = [task.client for task in tasks if self._exhausted(task.client, tunings[task.client])]
        yield from (ClientFailure(client, USED_UP) for client in spent)
        tasks = [task for task in tasks if task.client not in spent]
        if not tasks:
            return
        trained, shared = (f(round_index) for f in (self._config.aggregation.trained, self._config.aggregation.shared))
        private = [factor for factor in trained if factor not in shared]
        # A generator: a task, and with it what its client kept, comes into memory when a slot is free.
        longest_first = sorted(tasks, key=lambda task: -self._config.client.num_steps(len(self._clients[task.client])))
        tuning_tasks = (part for task in longest_first for part in self._tuning_tasks(task))
        per_client = 1 if self._config.objective.personal_pull is None else 2
        num_slots = min(len(tasks) * per_client, self._model.max_slots)
        controls = {task.client: task.control for task in tasks}
        done: dict[str, list[TuningResult]] = defaultdict(list)
        config = self._config
        results = tune(
            self._model,
            tuning_tasks,
            config.client,
            num_slots,
            self._on_step,
            trained,
            config.objective,
            keep_moments=config.client.moments == "keep",
        )
        for result in results:
            client = result.task.name.removeprefix(OWN_MODEL_OF)
            done[client].append(result)
            if len(done[client]) < per_client:
                continue
            own_and_shared = done.pop(client)
            failure = next((result.failure for result in own_and_shared if result.failure is not None), None)
            if failure is not None:
                yield ClientFailure(client, failure)
                continue
            shared_one, *own = sorted(own_and_shared, key=lambda result: result.task.name.startswith(OWN_MODEL_OF))
            kept = {OWN + name: tensor for each in own for name, tensor in each.adapter.tensors.items()}
            kept |= {PRIVATE + name: tensor for name, tensor in shared_one.adapter.only(private).items()}
            answer = self._answer(round_index, shared_one, shared, controls[client], kept)
            privacy = self._privacy[client]
            yield answer if privacy is None else replace(answer, epsilon=privacy.spent(tunings[client]))

    def _count(self, task: ClientTask) -> int:
        """Return how often a client has been tuned with this time, which is written down before it begins: noise that
        cannot be repeated costs each time anew.
        """
        if self._privacy[task.client] is None:
            return 0
        return task.num_earlier + 1 if self._draws.repeatable else self._store.count(task.client)

    def _exhausted(self, client: str, num_tunings: int) -> bool:
        privacy = self._privacy[client]
        return privacy is not None and privacy.exhausted(num_tunings - 1)

    def personal(self, adapter: Adapter, round_index: int) -> dict[str, Adapter]:
        """Return the own models of the clients that had them before a round: theirs whole, or the global one with
        factors of their own.
        """
        models = {}
        for client in self._clients:
            kept = self._store.read(client, round_index)
            if own := _named(kept, OWN):
                models[client] = adapter.with_tensors(own)
            elif _named(kept, PRIVATE):
                models[client] = _with_private(adapter, kept)
        return models

    def _tuning_tasks(self, task: ClientTask) -> Iterator[TuningTask]:
        """Yield what a client trains in a round: the adapter that it shares, and its own if it has one."""
        examples, objective = self._clients[task.client], self._config.objective
        kept = self._store.read(task.client, task.round_index)
        num_steps = self._config.client.num_steps(len(examples))
        start = _with_private(task.adapter, kept)
        shared = TuningTask(
            name=task.client,
            examples=examples,
            adapter=start,
            first_step=task.round_index * num_steps,
            first_batch=task.num_earlier * num_steps,
            num_steps=num_steps,
            total_steps=self._config.rounds * num_steps,
            seed=derive_seed(self._config.seed, "client", task.client),
            moments=Moments(kept["first"], kept["second"], int(kept["num_steps"])) if "first" in kept else None,
            anchor=start.tensors if objective.pull else None,
            pull=objective.pull,
            correction=_minus(task.control, _named(kept, CONTROL)) if objective.control_variates else None,
            privacy=self._row_privacy(task.client),
        )
        yield shared
        if objective.personal_pull is not None:
            own = _named(kept, OWN)
            yield replace(
                shared,
                name=OWN_MODEL_OF + task.client,
                adapter=task.adapter.with_tensors(own) if own else task.adapter,
                moments=None,
                anchor=task.adapter.tensors,
                pull=objective.personal_pull,
            )

    def _row_privacy(self, client: str) -> RowPrivacy | None:
        own = self._privacy[client]
        if own is None or own.mechanism != "dp-sgd":
            return None
        return RowPrivacy(own.clip_norm, own.noise_multiplier, own.share, self._draws, own.num_expected)

    def _answer(
        self,
        round_index: int,
        result: TuningResult,
        shared: Collection[str],
        control: Mapping[str, Tensor],
        kept: dict[str, Tensor],
    ) -> ClientUpdate:
        """Return what the client sends, and write down what it needs in its next round and nobody else may see."""
        config, client, received = self._config, result.task.name, result.task.adapter
        codec = upload_codec(config)
        remembers = config.objective.control_variates or not codec.is_plain
        earlier = self._store.read(client, round_index) if remembers else {}
        if (moments := result.moments) is not None:
            kept |= {"first": moments.first, "second": moments.second, "num_steps": torch.tensor(moments.num_steps)}
        received, tuned = _pruned(received, result.adapter, config.objective)
        update = {name: tensor - received.tensors[name] for name, tensor in tuned.only(shared).items()}
        control_step = {}
        if config.objective.control_variates:
            # c_k <- c_k - c + (x_received - x) / (sum of the learning rates)
            control_step = _minus({name: step / -result.rate_sum for name, step in update.items()}, control)
            changed = _minus(control_step, {n: -tensor for n, tensor in _named(earlier, CONTROL).items()})
            kept |= {CONTROL + name: tensor for name, tensor in changed.items()}
        if client in self._malicious and config.attack is not None:
            rng = derive_rng(config.seed, "attack", round_index, client)
            update = dict(config.attack.tamper(received.tensors, update, rng))
        if (own := self._privacy[client]) is not None and own.mechanism == "local":
            update = self._noisy(update, own, client, round_index)
        message = None
        if not codec.is_plain:
            errors = _named(earlier, ERROR)
            sent = codec.send(update, errors, round_index, client, received.tensors)
            update, message = dict(sent.received), sent.message
            kept |= {ERROR + name: tensor for name, tensor in {**errors, **sent.error}.items()}
        if kept:
            self._store.write(client, round_index, kept)
        return ClientUpdate(
            client=client,
            update=Adapter(update, received.rank, received.lora_alpha),
            num_examples=len(result.task.examples),
            num_tokens=result.num_tokens,
            loss=result.loss,
            num_steps=result.task.num_steps,
            control_step=control_step,
            message=message,
        )

    def _noisy(self, update: Mapping[str, Tensor], own: OwnPrivacy, client: str, round_index: int) -> dict[str, Tensor]:
        """Return an update that is clipped and hidden by noise."""
        clipped, _ = clip(update, own.clip_norm)
        size = own.noise_multiplier * own.clip_norm
        for name, tensor in clipped.items():
            noise = self._draws.normal(tuple(tensor.shape), client, round_index, name)
            clipped[name] = (tensor + size * torch.from_numpy(noise)).to(update[name])
        return clipped


def _pruned(received: Adapter, tuned: Adapter, objective: Objective) -> tuple[Adapter, Adapter]:
    """Return both without the last components, if the objective gives these up and the round made them smaller."""
    kept_rank = objective.kept_rank(received.rank)
    if kept_rank == received.rank or _last(tuned, kept_rank) >= _last(received, kept_rank):
        return received, tuned
    return received.cut(kept_rank), tuned.cut(kept_rank)


def _last(adapter: Adapter, kept_rank: int) -> float:
    """Return ``sum ||B'||_F ||A'||_F`` over the layers, of the components after `kept_rank`."""
    tensors = adapter.tensors
    return sum(
        float(tensors[f"{module}.lora_A.weight"][kept_rank:].double().norm())
        * float(tensors[f"{module}.lora_B.weight"][:, kept_rank:].double().norm())
        for module in adapter.modules()
    )


def _minus(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the difference of tensors by name; those that one lacks are zero there."""
    result = dict(left)
    for name, tensor in right.items():
        result[name] = result[name] - tensor if name in result else -tensor
    return result


def _named(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}


def _with_private(adapter: Adapter, kept: Mapping[str, Tensor]) -> Adapter:
    private = _named(kept, PRIVATE)
    return adapter.with_tensors({**adapter.tensors, **private}) if private else adapter
