"""The models that federated tuning is compared with: every client alone, and all rows in one place.

All are trained by the clients' own settings. The budget is one number of training tokens, that of the federation: the
centralised model spends it alone, the local-only models share it, each taking as many steps as its client is expected
to train in the federation. The learning rate's schedule runs over the whole of each training.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from fedit.cohort import client_rank, mean_share
from fedit.config import RunConfig
from fedit.evaluation.metrics import LOCAL_PREFIX
from fedit.files import write_tensors
from fedit.interfaces import FACTORS, Adapter, derive_seed
from fedit.model import StackedModel
from fedit.optimizer import Moments
from fedit.prepare import FederatedData
from fedit.tuning import TuningTask, tune

if TYPE_CHECKING:
    from torch import Tensor


CENTRAL = "central"
"""The name of the centralised model"""
SAVE_EVERY_S = 30
"""What a kill can cost of a baseline, in seconds, beside the piece that was being trained."""


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
    clients = {client: len(examples) for client, examples in data.clients.items()}
    share = mean_share(config, clients)
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
    num_steps = max(1, round(num_tokens / sum(example.num_trained for example in pooled) * steps_per_pass))
    return TuningTask(CENTRAL, pooled, initial, 0, num_steps, num_steps, derive_seed(config.seed, CENTRAL))


def train_baseline(
    config: RunConfig,
    model: StackedModel,
    tasks: Sequence[TuningTask],
    file_stem: Path,
    on_step: Callable[[int], None],
    on_saved: Callable[[int], None],
    trained: Collection[str] = FACTORS,
) -> Trained:
    """Train `tasks` in groups that fill the slots, going on with what an earlier call saved of them.

    Every training is cut into as many pieces as the federation has rounds. After a piece, if `SAVE_EVERY_S` have
    passed, its group is written to ``<file_stem>-<number>.safetensors``, moments included, so that resuming is exact:
    who shares a stack never changes, and a piece begins from the same bits whether they were read or not. `on_saved`
    is told the tokens that were trained since the last time.
    """
    num_slots = min(len(tasks), model.max_slots)
    result = Trained()
    for start in range(0, len(tasks), num_slots):
        group = tasks[start : start + num_slots]
        path = _group_file(file_stem, start)
        saved = (
            _read(path, group)
            if path.is_file()
            else _Saved(0, Trained({task.name: task.adapter for task in group}), {})
        )
        before, last_saved = sum(saved.trained.tokens.values()), time.monotonic()
        while saved.num_pieces < config.rounds:
            saved = _train_piece(config, model, group, saved, on_step, trained)
            if saved.num_pieces == config.rounds or time.monotonic() - last_saved >= SAVE_EVERY_S:
                _write(path, saved, trained)
                tokens = sum(saved.trained.tokens.values())
                on_saved(tokens - before)
                before, last_saved = tokens, time.monotonic()
        result |= saved.trained
    return result


def saved_tokens(file_stem: Path) -> int:
    """Return the tokens that earlier calls of `train_baseline` trained on and saved."""
    total = 0
    for path in file_stem.parent.glob(f"{file_stem.name}-*.safetensors"):
        with safe_open(path, "pt") as file:
            total += sum(_about(file)["tokens"].values())
    return total


def saved_adapters(
    config: RunConfig, clients: Mapping[str, int], initial: Adapter, folder: Path, wanted: Collection[str]
) -> dict[str, Adapter]:
    """Return those of the `wanted` models whose baseline in `folder` is trained to its end, by name.

    `clients` are the run's, with their numbers of rows; `initial` is the untrained adapter that all started from.
    """

    def start(name: str) -> Adapter:
        if name == CENTRAL:
            return initial
        return initial.cut(client_rank(config, clients, name.removeprefix(LOCAL_PREFIX)))

    found: dict[str, Adapter] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = _about(file)
            here = [name for name in about["adapters"] if name in wanted and about["num_pieces"] == config.rounds]
            found |= _adapters(file, {name: start(name) for name in here})
    return found


def trained_baselines(config: RunConfig, folder: Path) -> list[str]:
    """Return the names of the baselines in `folder` that are trained to their end."""
    names = []
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            about = _about(file)
        names += about["adapters"] if about["num_pieces"] == config.rounds else []
    return names


@dataclass(frozen=True, eq=False)
class _Saved:
    """How far the trainings of a group are."""

    num_pieces: int
    trained: Trained
    """Its adapters are those after the last piece, without the trainings that failed."""
    moments: Mapping[str, Moments]


def _train_piece(
    config: RunConfig,
    model: StackedModel,
    group: Sequence[TuningTask],
    saved: _Saved,
    on_step: Callable[[int], None],
    trained: Collection[str],
) -> _Saved:
    """Train the next piece of every task that has not failed."""
    pieces = []
    for task in group:
        if task.name in saved.trained.adapters:
            first, end = (
                task.total_steps * piece // config.rounds for piece in (saved.num_pieces, saved.num_pieces + 1)
            )
            piece = replace(
                task,
                adapter=saved.trained.adapters[task.name],
                first_step=first,
                first_batch=first,
                num_steps=end - first,
                moments=saved.moments.get(task.name),
            )
            pieces.append(piece)
    # Fewer steps than rounds leave some pieces empty.
    tasks = [piece for piece in pieces if piece.num_steps]
    results = list(tune(model, tasks, config.client, len(group), on_step, trained, config.objective))
    adapters = {piece.name: piece.adapter for piece in pieces}
    tokens, failures, moments = dict(saved.trained.tokens), dict(saved.trained.failures), dict(saved.moments)
    for result in results:
        name = result.task.name
        tokens[name] = tokens.get(name, 0) + result.num_tokens
        if result.failure is None:
            assert result.moments is not None
            adapters[name], moments[name] = result.adapter, result.moments
        else:
            failures[name] = result.failure
            del adapters[name]
    return _Saved(saved.num_pieces + 1, Trained(adapters, tokens, failures), moments)


def _group_file(file_stem: Path, start: int) -> Path:
    return file_stem.with_name(f"{file_stem.name}-{start:05d}.safetensors")


def _write(path: Path, saved: _Saved, trained: Collection[str]) -> None:
    """Write what is trained; the rest is in every task's adapter."""
    adapters = saved.trained.adapters
    tensors = {
        f"adapter/{model}\x1f{name}": t for model in adapters for name, t in adapters[model].only(trained).items()
    }
    for model in adapters.keys() & saved.moments.keys():
        tensors[f"first/{model}"] = saved.moments[model].first
        tensors[f"second/{model}"] = saved.moments[model].second
    about = {
        "num_pieces": saved.num_pieces,
        "adapters": list(adapters),
        "steps": {name: moments.num_steps for name, moments in saved.moments.items() if name in adapters},
        "tokens": saved.trained.tokens,
        "failures": saved.trained.failures,
    }
    write_tensors(path, tensors, {"fedit": json.dumps(about)})


def _read(path: Path, group: Sequence[TuningTask]) -> _Saved:
    with safe_open(path, "pt") as file:
        about = _about(file)
        started = {task.name: task.adapter for task in group}
        adapters = _adapters(file, {name: started[name] for name in about["adapters"]})
        moments = {
            name: Moments(file.get_tensor(f"first/{name}"), file.get_tensor(f"second/{name}"), num_steps)
            for name, num_steps in about["steps"].items()
        }
    return _Saved(about["num_pieces"], Trained(adapters, about["tokens"], about["failures"]), moments)


def _adapters(file: safe_open, start: Mapping[str, Adapter]) -> dict[str, Adapter]:
    """Return what was saved of the models in `start`, which says what they were before."""
    tensors: dict[str, dict[str, Tensor]] = {name: {} for name in start}
    for key in file.keys():  # noqa: SIM118 (not a dict)
        model, separator, name = key.removeprefix("adapter/").partition("\x1f")
        if separator and model in tensors:
            tensors[model][name] = file.get_tensor(key)
    return {name: start[name].with_tensors({**start[name].tensors, **own}) for name, own in tensors.items()}


def _about(file: safe_open) -> dict[str, Any]:
    return json.loads((file.metadata() or {})["fedit"])
