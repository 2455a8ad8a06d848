"""The models that federated tuning is compared with: every client alone, and all rows in one place.

All are trained by the clients' own settings. The budget is one number of training tokens, that of the federation: the
centralised model spends it alone, the local-only models share it, each taking as many steps as its client is expected
to train in the federation. The learning rate's schedule runs over the whole of each training.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from safetensors import safe_open
from safetensors.torch import save

from fedit.config import RunConfig
from fedit.engines.simulation import resolve_slots
from fedit.evaluation.metrics import LOCAL_PREFIX
from fedit.files import write_atomically
from fedit.interfaces import Adapter, derive_seed
from fedit.model import StackedModel
from fedit.prepare import FederatedData
from fedit.server import client_rank
from fedit.tuning import TuningTask, tune

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class Trained:
    """Adapters by model name, the tokens that each was trained on, and why the models that failed did."""

    adapters: Mapping[str, Adapter] = field(default_factory=dict)
    tokens: Mapping[str, int] = field(default_factory=dict)
    failures: Mapping[str, str] = field(default_factory=dict)

    def __or__(self, other: Trained) -> Trained:
        return Trained(
            {**self.adapters, **other.adapters}, {**self.tokens, **other.tokens}, {**self.failures, **other.failures}
        )


def local_tasks(config: RunConfig, data: FederatedData, initial: Adapter) -> list[TuningTask]:
    """Return one training per client, on its own rows only."""
    clients = list(data.clients)
    share = config.cohort.num_sampled(len(clients)) / len(clients)
    tasks = []
    for client in clients:
        examples = data.clients[client]
        num_steps = max(1, round(config.rounds * share * config.client.num_steps(len(examples))))
        adapter = initial.cut(client_rank(config, clients, client))
        seed = derive_seed(config.seed, "client", client)
        tasks.append(TuningTask(LOCAL_PREFIX + client, examples, adapter, 0, num_steps, num_steps, seed))
    return tasks


def central_task(config: RunConfig, data: FederatedData, initial: Adapter, num_tokens: int) -> TuningTask:
    """Return the training on the rows of all clients for `num_tokens`, up to the rest of a batch."""
    pooled = data.pooled
    steps_per_pass = -(-len(pooled) // config.client.batch_size)
    num_steps = max(1, round(num_tokens / sum(len(example) for example in pooled) * steps_per_pass))
    return TuningTask("central", pooled, initial, 0, num_steps, num_steps, derive_seed(config.seed, "central"))


def train_baseline(
    config: RunConfig,
    model: StackedModel,
    tasks: Sequence[TuningTask],
    file_stem: Path,
    on_step: Callable[[int], None],
    on_saved: Callable[[int], None],
) -> Trained:
    """Train `tasks` in groups that fill the slots, or read what an earlier call saved of them.

    A group is written to ``<file_stem>-<number>.safetensors`` when all of it is done, so that resuming is exact: who
    shares a stack never changes. `on_saved` is told the tokens of each group that was trained.
    """
    num_slots = resolve_slots(config.engine.slots, len(tasks))
    result = Trained()
    for start in range(0, len(tasks), num_slots):
        path = file_stem.with_name(f"{file_stem.name}-{start:05d}.safetensors")
        if not path.is_file():
            trained = _train(config, model, tasks[start : start + num_slots], num_slots, on_step)
            path.parent.mkdir(exist_ok=True)
            _write(path, trained)
            on_saved(sum(trained.tokens.values()))
        result |= _read(path)
    return result


def _train(
    config: RunConfig, model: StackedModel, tasks: Sequence[TuningTask], num_slots: int, on_step: Callable[[int], None]
) -> Trained:
    results = list(tune(model, tasks, config.client, num_slots, on_step))
    return Trained(
        {result.task.name: result.adapter for result in results if result.failure is None},
        {result.task.name: result.num_tokens for result in results},
        {result.task.name: result.failure for result in results if result.failure is not None},
    )


def _write(path: Path, trained: Trained) -> None:
    tensors = {f"{model}\x1f{n}": t for model, adapter in trained.adapters.items() for n, t in adapter.tensors.items()}
    about = {
        "adapters": {name: [adapter.rank, adapter.lora_alpha] for name, adapter in trained.adapters.items()},
        "tokens": trained.tokens,
        "failures": trained.failures,
    }
    write_atomically(path, save(tensors, {"fedit": json.dumps(about)}))


def _read(path: Path) -> Trained:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["fedit"])
        tensors: dict[str, dict[str, Tensor]] = {name: {} for name in about["adapters"]}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            model, _, name = key.partition("\x1f")
            tensors[model][name] = file.get_tensor(key)
    adapters = {name: Adapter(tensors[name], *described) for name, described in about["adapters"].items()}
    return Trained(adapters, about["tokens"], about["failures"])
