"""The experiment: federated tuning and its baselines at the same token budget, evaluated on the same held-out rows.

Every phase leaves its result in the run folder before the next one starts, and a phase's result depends on nothing but
the configuration and the phases before. So a run that was killed is resumed by skipping what is there.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import resource
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from fedit.config import RunConfig
from fedit.data import EncodingReport, encode_all, load_examples
from fedit.engines.simulation import Simulation, resolve_slots
from fedit.evaluation.heldout import mean_loss, predict
from fedit.evaluation.metrics import LOCAL_PREFIX, Prediction, summarise
from fedit.export import save_adapter
from fedit.files import append_line, write_atomically, write_json
from fedit.interfaces import Adapter, ConfigError, DataError, EncodedExample, derive_rng, derive_seed
from fedit.model import StackedModel, load_base, load_tokenizer, resolve_device
from fedit.partition import partition_statistics
from fedit.report import RunFolder, write_report
from fedit.server import RoundRecord, ServerState, client_rank, load_state, never_sampled, save_state, train
from fedit.tuning import TuningTask, tune

# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A phase began: ``federated``, ``local``, ``central`` or ``evaluation``."""

    phase: str
    total: int
    """Work units of the phase: training tokens (estimated), or models in the evaluation."""


@dataclass(frozen=True, slots=True)
class Progressed:
    """Some units of the current phase are done."""

    amount: int


@dataclass(frozen=True, slots=True)
class RoundFinished:
    """A round is done and saved."""

    record: RoundRecord
    seconds: float
    num_rounds: int


Event = PhaseStarted | Progressed | RoundFinished
Notify = Callable[[Event], None]


# ------------------------------------------------------------------------------------------------------------ data


@dataclass(frozen=True, eq=False)
class FederatedData:
    """The rows of every client and the held-out rows, encoded; `summary` is the content of partition.json."""

    clients: Mapping[str, Sequence[EncodedExample]]
    test: Sequence[EncodedExample]
    summary: Mapping[str, Any]

    @property
    def pooled(self) -> list[EncodedExample]:
        """All clients' rows, in client order: what centralised tuning sees."""
        return [example for examples in self.clients.values() for example in examples]


def prepare_data(config: RunConfig) -> FederatedData:
    """Load, encode and partition the rows.

    Raises:
        DataError, EngineError: the data or the tokenizer cannot be used.
    """
    tokenizer = load_tokenizer(config.model.path)
    train_examples, test_examples = load_examples(config.data, config.seed)
    rows, train_report = encode_all(train_examples, config.data, tokenizer)
    test, test_report = encode_all(test_examples, config.data, tokenizer)
    owners = config.partition.split([row.example for row in rows], derive_rng(config.seed, "partition"))
    clients = {client: [rows[index] for index in indices] for client, indices in owners.items()}
    if config.cohort.min_updates > config.cohort.num_sampled(len(clients)):
        raise ConfigError(
            f"[cohort] min_updates = {config.cohort.min_updates} can never be reached: the partition has {len(clients)} "
            f"clients, a cohort {config.cohort.num_sampled(len(clients))}."
        )
    summary = partition_statistics([row.example for row in rows], owners)
    for client, examples in clients.items():
        summary["clients"][client]["tokens"] = sum(len(example) for example in examples)
    categories = [example.example.category for example in test]
    summary["test"] = {category: categories.count(category) for category in dict.fromkeys(categories)}
    summary["encoding"] = {"train": _counts(train_report), "test": _counts(test_report)}
    summary["never_sampled"] = never_sampled(config, list(clients))
    summary["fingerprint"] = _fingerprint([*clients.values(), test])
    return FederatedData(clients, test, summary)


def _counts(report: EncodingReport) -> dict[str, Any]:
    return {**asdict(report), "dropped": report.dropped}


def _fingerprint(parts: Sequence[Sequence[EncodedExample]]) -> str:
    """Return a hash of all token ids and their owners: a resumed run must train on the same data."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big"))
        for example in part:
            digest.update(example.input_ids.tobytes() + example.supervised.tobytes())
    return digest.hexdigest()


# -------------------------------------------------------------------------------------------------------- the phases


def run_experiment(
    config: RunConfig,
    folder: Path,
    data: FederatedData,
    notify: Notify = lambda event: None,
    *,
    recipe: str = "",
    plugin_files: Sequence[Path] = (),
) -> RunFolder:
    """Run, or go on with, the experiment in `folder`, and return what it holds in the end.

    `recipe` and `plugin_files` are recorded for the report and for resuming.

    Raises:
        RoundError: a round could not be completed. Whatever is raised, calling again goes on from what was saved.
    """
    device = resolve_device(config.engine.device)
    model = StackedModel(load_base(config.model, device), load_tokenizer(config.model.path), config.adapter)
    _start_folder(folder, data, describe_run(config, model, recipe, plugin_files))
    initial = model.fresh_adapter(derive_rng(config.seed, "adapter"))

    federated = _federated(config, folder, data, model, initial, notify)
    save_adapter(federated, config, model, folder / "adapter")
    models: dict[str, Adapter | None] = {"base": None, "federated": federated}
    tokens = {"base": 0, "federated": sum(line["tokens"] for line in RunFolder.read(folder).rounds)}
    failures: dict[str, str] = {}
    if config.evaluation.baselines:
        for trained in (
            _local(config, folder, data, model, initial, notify),
            _central(config, folder, data, model, initial, tokens["federated"], notify),
        ):
            models |= trained.adapters
            tokens |= trained.tokens
            failures |= trained.failures
    if not (folder / "evaluation.json").is_file():
        _evaluate(config, folder, data, model, models, tokens, failures, notify)
    write_report(folder)
    return RunFolder.read(folder)


def _federated(
    config: RunConfig, folder: Path, data: FederatedData, model: StackedModel, initial: Adapter, notify: Notify
) -> Adapter:
    checkpoints, rounds = folder / "checkpoints", folder / "rounds.jsonl"
    state = load_state(checkpoints) or ServerState(0, initial)
    _keep_rounds(rounds, state.round_index)
    engine = Simulation(config, model, data.clients, lambda count: notify(Progressed(count)))
    watch = _Watch()

    def finish_round(state: ServerState, record: RoundRecord) -> None:
        every = config.evaluation.every
        if state.round_index == config.rounds or (every and state.round_index % every == 0):
            record = replace(record, test_loss=_finite(mean_loss(model, state.adapter, data.test)))
        # The line comes first: a line without its checkpoint is dropped on resume, the reverse could not be mended.
        append_line(rounds, asdict(record))
        save_state(state, checkpoints)
        timing = watch.lap(record.tokens)
        append_line(folder / "timings.jsonl", {"round": record.round, **timing})
        notify(RoundFinished(record, timing["seconds"], config.rounds))

    per_round = sum(_round_tokens(config, examples) for examples in data.clients.values())
    share = config.cohort.num_sampled(len(data.clients)) / len(data.clients)
    notify(PhaseStarted("federated", round((config.rounds - state.round_index) * per_round * share)))
    return train(config, engine, state, finish_round).adapter


@dataclass(frozen=True, eq=False)
class _Trained:
    """Adapters of a baseline by model name, the tokens each was trained on, and the models that failed."""

    adapters: Mapping[str, Adapter]
    tokens: Mapping[str, int]
    failures: Mapping[str, str]


def _local(
    config: RunConfig, folder: Path, data: FederatedData, model: StackedModel, initial: Adapter, notify: Notify
) -> _Trained:
    """Train every client alone, for the steps that it is expected to train in the federation."""
    clients = list(data.clients)
    share = config.cohort.num_sampled(len(clients)) / len(clients)
    tasks = []
    for client in clients:
        examples = data.clients[client]
        num_steps = max(1, round(config.rounds * share * config.client.num_steps(len(examples))))
        adapter = initial.cut(client_rank(config, clients, client))
        seed = derive_seed(config.seed, "client", client)
        tasks.append(TuningTask(LOCAL_PREFIX + client, examples, adapter, 0, num_steps, num_steps, seed))
    total = sum(_round_tokens(config, examples) for examples in data.clients.values()) * config.rounds * share
    return _baseline(config, folder, "local", model, tasks, round(total), notify)


def _central(
    config: RunConfig,
    folder: Path,
    data: FederatedData,
    model: StackedModel,
    initial: Adapter,
    num_tokens: int,
    notify: Notify,
) -> _Trained:
    """Train one model on all rows, with the clients' own settings, for as many tokens as the federation trained on."""
    pooled = data.pooled
    steps_per_pass = -(-len(pooled) // config.client.batch_size)
    num_steps = max(1, round(num_tokens / sum(len(example) for example in pooled) * steps_per_pass))
    task = TuningTask("central", pooled, initial, 0, num_steps, num_steps, derive_seed(config.seed, "central"))
    return _baseline(config, folder, "central", model, [task], num_tokens, notify)


def _baseline(
    config: RunConfig,
    folder: Path,
    phase: str,
    model: StackedModel,
    tasks: Sequence[TuningTask],
    num_tokens: int,
    notify: Notify,
) -> _Trained:
    """Train `tasks` in groups that fill the slots; each group is saved when it is done, so that resuming is exact."""
    notify(PhaseStarted(phase, num_tokens))
    num_slots = resolve_slots(config.engine.slots, len(tasks))
    adapters: dict[str, Adapter] = {}
    tokens: dict[str, int] = {}
    failures: dict[str, str] = {}
    for start in range(0, len(tasks), num_slots):
        group = tasks[start : start + num_slots]
        path = folder / "baselines" / f"{phase}-{start:05d}.safetensors"
        if not path.is_file():
            watch = _Watch()
            results = list(tune(model, group, config.client, num_slots, lambda count: notify(Progressed(count))))
            trained = _Trained(
                {result.task.name: result.adapter for result in results if result.failure is None},
                {result.task.name: result.num_tokens for result in results},
                {result.task.name: result.failure for result in results if result.failure is not None},
            )
            path.parent.mkdir(exist_ok=True)
            _save_trained(path, trained)
            timing = watch.lap(sum(trained.tokens.values()))
            append_line(folder / "timings.jsonl", {"phase": phase, **timing, "tokens": sum(trained.tokens.values())})
        saved = _load_trained(path)
        adapters |= saved.adapters
        tokens |= saved.tokens
        failures |= saved.failures
    return _Trained(adapters, tokens, failures)


def _evaluate(
    config: RunConfig,
    folder: Path,
    data: FederatedData,
    model: StackedModel,
    models: Mapping[str, Adapter | None],
    tokens: Mapping[str, int],
    failures: Mapping[str, str],
    notify: Notify,
) -> None:
    notify(PhaseStarted("evaluation", len(models)))
    watch = _Watch()
    predictions: dict[str, list[Prediction]] = {name: [] for name in models}
    max_new_tokens = config.evaluation.max_new_tokens
    for prediction in predict(model, models, data.test, max_new_tokens, lambda count: notify(Progressed(count))):
        predictions[prediction.model].append(prediction)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for rows in predictions.values() for row in rows]
    write_atomically(folder / "answers.jsonl", ("\n".join(lines) + "\n").encode())
    evaluation = summarise(predictions, tokens, config.seed)
    if failures:
        evaluation["failures"] = dict(failures)
    write_json(folder / "evaluation.json", evaluation)
    append_line(folder / "timings.jsonl", {"phase": "evaluation", **watch.lap(0)})


# ------------------------------------------------------------------------------------------------------- run folder


def check_folder(folder: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse an output folder that cannot be used, before anything is loaded.

    Raises:
        ConfigError: it holds a run and `resume` is off, or another configuration's run, or cannot be written.
    """
    described = folder / "config.json"
    if not resume and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        what = "a run" if described.is_file() else "files"
        raise ConfigError(
            f"--out {folder} holds {what} already. Continue it with `fedit run --resume {folder}`, or choose another folder."
        )
    if resume and json.loads(described.read_text(encoding="utf-8"))["config"] != config.to_json():
        raise ConfigError(f"{folder} holds the run of another configuration. Choose another folder for this one.")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"--out {folder} cannot be written: {error.strerror}. Choose another folder.") from error


def describe_run(config: RunConfig, model: StackedModel, recipe: str, plugin_files: Sequence[Path]) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "config": config.to_json(),
        "recipe": recipe,
        "plugin_files": [str(file) for file in plugin_files],
        "versions": {"python": platform.python_version()}
        | {name: importlib.metadata.version(name) for name in ("fedit", "torch", "transformers", "peft", "numpy")},
        "hardware": {
            "device": torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu",
            "cpu_count": os.cpu_count(),
            "dtype": str(model.base.dtype).removeprefix("torch."),
        },
        "model": {
            "parameters": sum(p.numel() for p in model.base.parameters() if not p.requires_grad),
            "adapter_parameters": model.num_parameters,
        },
    }


def _start_folder(folder: Path, data: FederatedData, described: Mapping[str, Any]) -> None:
    """Write config.json and partition.json, or make sure that those of a resumed run still hold."""
    folder.mkdir(parents=True, exist_ok=True)
    partition = folder / "partition.json"
    if not partition.is_file():
        write_json(folder / "config.json", described)
        write_json(partition, data.summary)
    elif json.loads(partition.read_text(encoding="utf-8"))["fingerprint"] != data.summary["fingerprint"]:
        raise DataError(
            f"{folder} was started on other rows: what [data] path = {described['config']['data']['path']!r} gives now "
            "differs. Restore the data, or start a new run."
        )


def _keep_rounds(path: Path, num_rounds: int) -> None:
    """Drop the lines after the last checkpoint, a half-written one among them."""
    if path.is_file():
        whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
        write_atomically(path, b"".join(whole[:num_rounds]))


def _save_trained(path: Path, trained: _Trained) -> None:
    tensors = {f"{model}\x1f{n}": t for model, adapter in trained.adapters.items() for n, t in adapter.tensors.items()}
    about = {
        "adapters": {name: [adapter.rank, adapter.lora_alpha] for name, adapter in trained.adapters.items()},
        "tokens": trained.tokens,
        "failures": trained.failures,
    }
    write_atomically(path, save(tensors, {"fedit": json.dumps(about)}))


def _load_trained(path: Path) -> _Trained:
    with safe_open(path, "pt") as file:
        about = json.loads((file.metadata() or {})["fedit"])
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in about["adapters"]}
        for key in file.keys():  # noqa: SIM118 (not a dict)
            model, _, name = key.partition("\x1f")
            tensors[model][name] = file.get_tensor(key)
    adapters = {name: Adapter(tensors[name], *described) for name, described in about["adapters"].items()}
    return _Trained(adapters, about["tokens"], about["failures"])


def _round_tokens(config: RunConfig, examples: Sequence[EncodedExample]) -> float:
    """Return the tokens that a client is expected to train on in a round."""
    passes = config.client.num_steps(len(examples)) / -(-len(examples) // config.client.batch_size)
    return passes * sum(len(example) for example in examples)


def _finite(value: float) -> float | None:
    return value if np.isfinite(value) else None


class _Watch:
    """Wall and CPU seconds since the last lap, and the process's peak memory."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, num_tokens: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        return {
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        }
