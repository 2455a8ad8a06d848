"""The simulation engine: all clients in this process, tuned together on one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

import torch

from fedit.config import RunConfig
from fedit.engines.client_store import ClientStore
from fedit.interfaces import ClientFailure, ClientTask, ClientUpdate, EncodedExample, derive_seed
from fedit.model import StackedModel
from fedit.tuning import Moments, TuningResult, TuningTask, tune


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

    def client_ids(self) -> Sequence[str]:
        return list(self._clients)

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the clients' results as their slots finish; who has most steps begins first, or would end alone."""
        round_of = {task.client: task.round_index for task in tasks}
        num_slots = min(len(tasks), self._model.max_slots)
        # A generator: a task, and with it what its client kept, comes into memory when a slot is free.
        longest_first = sorted(tasks, key=lambda task: -self._config.client.num_steps(len(self._clients[task.client])))
        tuning_tasks = (self._tuning_task(task) for task in longest_first)
        for result in tune(self._model, tuning_tasks, self._config.client, num_slots, self._on_step):
            if self._config.client.moments == "keep" and result.failure is None:
                self._keep(round_of[result.task.name], result)
            yield _answer(result)

    def _tuning_task(self, task: ClientTask) -> TuningTask:
        examples = self._clients[task.client]
        num_steps = self._config.client.num_steps(len(examples))
        return TuningTask(
            name=task.client,
            examples=examples,
            adapter=task.adapter,
            first_step=task.round_index * num_steps,
            first_batch=task.num_earlier * num_steps,
            num_steps=num_steps,
            total_steps=self._config.rounds * num_steps,
            seed=derive_seed(self._config.seed, "client", task.client),
            moments=self._kept_moments(task) if self._config.client.moments == "keep" else None,
        )

    def _kept_moments(self, task: ClientTask) -> Moments | None:
        kept = self._store.read(task.client, task.round_index)
        return Moments(kept["first"], kept["second"], int(kept["num_steps"])) if kept else None

    def _keep(self, round_index: int, result: TuningResult) -> None:
        moments = result.moments
        tensors = {"first": moments.first, "second": moments.second, "num_steps": torch.tensor(moments.num_steps)}
        self._store.write(result.task.name, round_index, tensors)


def _answer(result: TuningResult) -> ClientUpdate | ClientFailure:
    if result.failure is not None:
        return ClientFailure(result.task.name, result.failure)
    received = result.task.adapter
    update = {name: tuned - received.tensors[name] for name, tuned in result.adapter.tensors.items()}
    return ClientUpdate(
        client=result.task.name,
        update=received.with_tensors(update),
        num_examples=len(result.task.examples),
        num_tokens=result.num_tokens,
        loss=result.loss,
    )
