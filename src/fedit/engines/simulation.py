"""The simulation engine: all clients in this process, tuned together on one resident base."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence

from fedit.config import RunConfig
from fedit.interfaces import ClientFailure, ClientTask, ClientUpdate, EncodedExample, derive_seed
from fedit.model import StackedModel
from fedit.tuning import TuningResult, TuningTask, tune

MAX_SLOTS = 16
"""Of ``slots = "auto"``: with more, the micro-batches are full already and only the optimizer state grows."""


class Simulation:
    """An `Engine` whose clients are lists of encoded examples."""

    def __init__(
        self,
        config: RunConfig,
        model: StackedModel,
        clients: Mapping[str, Sequence[EncodedExample]],
        on_step: Callable[[int], None] = lambda num_tokens: None,
    ) -> None:
        self._config = config
        self._model = model
        self._clients = clients
        self._on_step = on_step

    def client_ids(self) -> Sequence[str]:
        return list(self._clients)

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        """Yield the clients' results as their slots finish."""
        rounds = self._config.rounds
        tuning_tasks = []
        for task in tasks:
            examples = self._clients[task.client]
            num_steps = self._config.client.num_steps(len(examples))
            tuning_tasks.append(
                TuningTask(
                    name=task.client,
                    examples=examples,
                    adapter=task.adapter,
                    first_step=task.round_index * num_steps,
                    first_batch=task.num_earlier * num_steps,
                    num_steps=num_steps,
                    total_steps=rounds * num_steps,
                    seed=derive_seed(self._config.seed, "client", task.client),
                )
            )
        num_slots = resolve_slots(self._config.engine.slots, len(tasks))
        for result in tune(self._model, tuning_tasks, self._config.client, num_slots, self._on_step):
            yield _answer(result)


def resolve_slots(slots: int | str, num_tasks: int) -> int:
    """Return how many tasks are tuned at the same time."""
    return min(num_tasks, slots if isinstance(slots, int) else MAX_SLOTS)


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
