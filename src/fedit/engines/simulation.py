"""The simulation engine: all clients in this process, tuned together on one resident base."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from fedit.codec import upload_codec
from fedit.config import RunConfig
from fedit.engines.client_store import ClientStore
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EncodedExample, derive_rng, derive_seed
from fedit.model import StackedModel
from fedit.tuning import Moments, TuningResult, TuningTask, tune

PRIVATE, ERROR = "private/", "error/"
"""In front of names in a client's store: factors of its own; what its messages have not told yet."""


class Simulation:
    """An `Engine` whose clients are lists of encoded examples; what they keep between rounds is in `store`."""

    def __init__(
        self,
        config: RunConfig,
        model: StackedModel,
        clients: Mapping[str, Sequence[EncodedExample]],
        store: ClientStore,
        on_step: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
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
        trained, shared = (f(round_index) for f in (self._config.aggregation.trained, self._config.aggregation.shared))
        private = [factor for factor in trained if factor not in shared]
        num_slots = min(len(tasks), self._model.max_slots)
        # A generator: a task, and with it what its client kept, comes into memory when a slot is free.
        longest_first = sorted(tasks, key=lambda task: -self._config.client.num_steps(len(self._clients[task.client])))
        tuning_tasks = (self._tuning_task(task) for task in longest_first)
        for result in tune(self._model, tuning_tasks, self._config.client, num_slots, self._on_step, trained):
            if result.failure is not None:
                yield ClientFailure(result.task.name, result.failure)
            else:
                yield self._answer(round_index, result, shared, private)

    def personal(self, adapter: Adapter, round_index: int) -> dict[str, Adapter]:
        """Return the models of the clients that had factors of their own before a round: the global one with these."""
        own = {client: self._store.read(client, round_index) for client in self._clients}
        return {client: _with_private(adapter, kept) for client, kept in own.items() if _named(kept, PRIVATE)}

    def _tuning_task(self, task: ClientTask) -> TuningTask:
        examples = self._clients[task.client]
        kept = self._store.read(task.client, task.round_index)
        num_steps = self._config.client.num_steps(len(examples))
        return TuningTask(
            name=task.client,
            examples=examples,
            adapter=_with_private(task.adapter, kept),
            first_step=task.round_index * num_steps,
            first_batch=task.num_earlier * num_steps,
            num_steps=num_steps,
            total_steps=self._config.rounds * num_steps,
            seed=derive_seed(self._config.seed, "client", task.client),
            moments=Moments(kept["first"], kept["second"], int(kept["num_steps"])) if "first" in kept else None,
        )

    def _answer(
        self, round_index: int, result: TuningResult, shared: Collection[str], private: Collection[str]
    ) -> ClientUpdate:
        """Return what the client sends, and write down what it needs in its next round and nobody else may see."""
        client, received = result.task.name, result.task.adapter
        kept = {PRIVATE + name: tensor for name, tensor in result.adapter.only(private).items()}
        if self._config.client.moments == "keep":
            moments = result.moments
            kept |= {"first": moments.first, "second": moments.second, "num_steps": torch.tensor(moments.num_steps)}
        update = {name: tuned - received.tensors[name] for name, tuned in result.adapter.only(shared).items()}
        if client in self._malicious and self._config.attack is not None:
            rng = derive_rng(self._config.seed, "attack", round_index, client)
            update = dict(self._config.attack.tamper(received.tensors, update, rng))
        num_bytes, codec = None, upload_codec(self._config)
        if not codec.is_plain:
            errors = _named(self._store.read(client, round_index), ERROR)
            sent = codec.send(update, errors, round_index, client, received.tensors)
            update, num_bytes = dict(sent.received), len(sent.message)
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
            num_bytes=num_bytes,
        )


def _named(kept: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in kept.items() if name.startswith(prefix)}


def _with_private(adapter: Adapter, kept: Mapping[str, Tensor]) -> Adapter:
    return adapter.with_tensors({**adapter.tensors, **_named(kept, PRIVATE)})
