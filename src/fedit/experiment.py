"""The experiment: federated tuning and its baselines at the same token budget, evaluated on the same held-out rows.

Every phase leaves its result in the run folder before the next one starts, and a phase's result depends on nothing but
the configuration and the phases before. So a run that was killed is resumed by skipping what is there.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fedit.baselines import Trained, central_task, local_tasks, saved_tokens, train_baseline
from fedit.checkpoints import load_state, save_state
from fedit.cohort import mean_share
from fedit.config import RunConfig, parse_config, run_command
from fedit.data.reading import is_hub_name
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.evaluation.heldout import mean_loss, predict, preference_accuracy
from fedit.evaluation.metrics import FEDERATED_PREFIX, LOCAL_PREFIX, PERSONAL_PREFIX, Prediction, summarise
from fedit.export import save_adapter
from fedit.files import append_line, folder_name, keep_lines, write_atomically, write_json
from fedit.interfaces import FACTORS, Adapter, ConfigError, DataError, EncodedExample, Engine, EngineError, derive_rng
from fedit.model import StackedModel
from fedit.prepare import FederatedData, prepare_model
from fedit.report import RunFolder, write_report
from fedit.server import RoundRecord, ServerState, train
from fedit.tuning import TuningTask

if TYPE_CHECKING:
    from fedit.engines.remote import Remote

# ---------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PhaseStarted:
    """A phase began: ``federated``, ``local``, ``central`` or ``evaluation``; ``sites`` in a real federation."""

    phase: str
    total: int
    """Work units of the phase: training tokens (estimated), models in the evaluation, rounds of sites."""


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


# -------------------------------------------------------------------------------------------------------- the phases


@dataclass(frozen=True, eq=False)
class _Run:
    """What every phase needs."""

    config: RunConfig
    folder: Path
    data: FederatedData
    model: StackedModel
    initial: Adapter
    """The untrained adapter that every model starts from."""
    notify: Notify

    tokens: list[int] = field(default_factory=list)
    """Of the turns since somebody asked"""

    def step_done(self, num_tokens: int) -> None:
        self.tokens.append(num_tokens)
        self.notify(Progressed(num_tokens))

    def tokens_done(self) -> int:
        """Return the tokens trained on since the last call."""
        total = sum(self.tokens)
        self.tokens.clear()
        return total

    def append_timing(self, timing: Mapping[str, Any]) -> None:
        append_line(self.folder / "timings.jsonl", timing)


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
    prepared = prepare_model(config, list(data.clients.values()))
    model = prepared.model
    described = describe_run(config, model, prepared.weights_sha256, recipe, plugin_files)
    _start_folder(folder, data, described | {"command": run_command(config, recipe, plugin_files)})
    run = _Run(config, folder, prepared.with_margins(config, data), model, prepared.initial, notify)

    federated, personal = _federated(run)
    keeps_factors = _keeps_factors(config)
    if not keeps_factors:
        save_adapter(federated, config, model, folder / "adapter")
    for client, adapter in personal.items():
        save_adapter(adapter, config, model, folder / "adapters" / folder_name(client))
    num_tokens = sum(line["tokens"] for line in RunFolder.read(folder).rounds)
    prefix = FEDERATED_PREFIX if keeps_factors else PERSONAL_PREFIX
    models = {} if keeps_factors else {"federated": federated}
    models |= {prefix + client: adapter for client, adapter in personal.items()}
    tokens = {"base": 0} | dict.fromkeys(models, num_tokens)
    if not keeps_factors:  # each client's own model has seen its own rows only; this is their mean
        tokens |= {prefix + client: round(num_tokens / len(personal)) for client in personal}
    trained = Trained(models, tokens)
    if config.evaluation.baselines:
        trained |= _baseline(run, "local", local_tasks(config, data, run.initial), num_tokens)
        trained |= _baseline(run, "central", [central_task(config, data, run.initial, num_tokens)], num_tokens)
    if not (folder / "evaluation.json").is_file():
        _evaluate(run, trained)
    write_report(folder)
    return RunFolder.read(folder)


def _federated(run: _Run) -> tuple[Adapter, dict[str, Adapter]]:
    """Train the rounds that are not saved yet; return the global adapter, and the own models of clients that have
    factors, or a whole model, of their own.
    """
    config, checkpoints, rounds = run.config, run.folder / "checkpoints", run.folder / "rounds.jsonl"
    state = load_state(checkpoints) or ServerState(0, run.initial)
    keep_lines(rounds, state.round_index)
    keep_lines(run.folder / "timings.jsonl")
    watch = Watch()

    def finish_round(state: ServerState, record: RoundRecord) -> None:
        timing = watch.lap(run.tokens_done())
        every = config.evaluation.every
        if state.round_index == config.rounds or (every and state.round_index % every == 0):
            models = [state.adapter]
            if _keeps_factors(config):
                models = list(engine.personal(state.adapter, state.round_index).values())
            loss = mean_loss(run.model, models, run.data.test)
            record = replace(record, test_loss=loss if math.isfinite(loss) else None)
        # The line comes first: a line without its checkpoint is dropped on resume, the reverse could not be mended.
        line = asdict(record)
        timing["aggregation_seconds"] = round(line.pop("aggregation_s"), 6)
        append_line(rounds, line)
        save_state(state, checkpoints)
        run.append_timing({"round": record.round, **timing})
        run.notify(RoundFinished(record, timing["seconds"], config.rounds))
        watch.lap(0)  # evaluating and saving belong to no round's tokens per second

    engine = Simulation(
        config, run.model, run.data.clients, ClientStore(run.folder / "clients", config.digest()), run.step_done
    )
    share = mean_share(config, engine.clients())
    models_per_client = 1 if config.objective.personal_pull is None else 2
    per_pass = sum(_round_tokens(config, examples) for examples in run.data.clients.values())
    per_round = share * models_per_client * per_pass
    run.notify(PhaseStarted("federated", round((config.rounds - state.round_index) * per_round)))
    # A simulation repeats itself; a real run's noise comes from the operating system.
    noise = lambda round_index: derive_rng(config.seed, "privacy", round_index).standard_normal
    adapter = train(config, shown_to_server(config, engine), state, finish_round, noise).adapter
    return adapter, engine.personal(adapter, config.rounds)


def shown_to_server(config: RunConfig, engine: Simulation | Remote) -> Engine:
    """Return what the server sees of the clients: each of them, or sums alone."""
    if config.secure_sums is None:
        return engine
    from fedit.engines.secure import secured

    return secured(config, engine)


def _keeps_factors(config: RunConfig) -> bool:
    """Tell whether clients have factors of their own, so that there is no model for all."""
    return set(config.aggregation.shared(0)) != set(config.aggregation.trained(0))


def _baseline(run: _Run, phase: str, tasks: Sequence[TuningTask], num_tokens: int) -> Trained:
    """Train both factors of an adapter, or what the clients train where that is something else (cores, ...)."""
    file_stem = run.folder / "baselines" / phase
    run.notify(PhaseStarted(phase, max(0, num_tokens - saved_tokens(file_stem))))
    watch = Watch()

    def saved(tokens: int) -> None:
        run.append_timing({"phase": phase, **watch.lap(tokens), "tokens": tokens})

    trained = set(run.config.aggregation.trained(0))
    factors = FACTORS if trained <= set(FACTORS) else trained
    return train_baseline(run.config, run.model, tasks, file_stem, run.step_done, saved, factors)


def _evaluate(run: _Run, trained: Trained) -> None:
    """Run the base and every trained model on the held-out rows; write answers.jsonl, then evaluation.json."""
    models: dict[str, Adapter | None] = {"base": None, **trained.adapters}
    run.notify(PhaseStarted("evaluation", len(models)))
    watch = Watch()
    predictions: dict[str, list[Prediction]] = {name: [] for name in models}
    max_new_tokens = run.config.evaluation.max_new_tokens
    for prediction in predict(run.model, models, run.data.test, max_new_tokens, run.step_done):
        predictions[prediction.model].append(prediction)
    lines = [json.dumps(asdict(row), ensure_ascii=False) for rows in predictions.values() for row in rows]
    write_atomically(run.folder / "answers.jsonl", ("\n".join(lines) + "\n").encode())
    evaluation = summarise(predictions, trained.tokens, run.config.seed)
    if run.config.objective.preferences:
        evaluation["preference_accuracy"] = preference_accuracy(run.model, models, run.data.test)
    evaluation |= _unseen(run, models, predictions, trained.tokens)
    if run.data.probes:
        evaluation["attack"] = _attack_success(run, models)
    if trained.failures:
        evaluation["failures"] = dict(trained.failures)
    write_json(run.folder / "evaluation.json", evaluation)
    run.append_timing({"phase": "evaluation", **watch.lap(0)})


def _unseen(
    run: _Run,
    models: Mapping[str, Adapter | None],
    predictions: Mapping[str, Sequence[Prediction]],
    tokens: Mapping[str, int],
) -> dict[str, Any]:
    """Return the same measures on what no model was trained on: rows of other clients, by client, and of other
    categories.
    """
    found, seed = {}, run.config.seed
    if run.data.unseen:
        rows = [row for own in run.data.unseen.values() for row in own]
        owners = [client for client, own in run.data.unseen.items() for _ in own]
        by_model: dict[str, list[Prediction]] = {name: [] for name in models}
        for each in predict(run.model, models, rows, run.config.evaluation.max_new_tokens):
            by_model[each.model].append(replace(each, category=owners[each.index]))
        found["unseen_clients"] = summarise(by_model, tokens, seed)
    if categories := run.config.evaluation.unseen_categories:
        chosen = {name: [row for row in rows if row.category in categories] for name, rows in predictions.items()}
        found["unseen_categories"] = summarise(chosen, tokens, seed)
    return found


def _attack_success(run: _Run, models: Mapping[str, Adapter | None]) -> dict[str, Any]:
    """Return, by model, the share of the probes that it answers as the attack wants."""
    judged = {name: adapter for name, adapter in models.items() if not name.startswith(LOCAL_PREFIX)}
    answers: dict[str, list[bool]] = {name: [] for name in judged}
    for prediction in predict(run.model, judged, run.data.probes, run.config.evaluation.max_new_tokens):
        answers[prediction.model].append(bool(prediction.passed))
    return {"success": {name: sum(hits) / len(hits) for name, hits in answers.items()}}


# ------------------------------------------------------------------------------------------------------- run folder


def check_folder(folder: Path, config: RunConfig, *, resume: bool, at_sites: bool = False) -> None:
    """Refuse an output folder that cannot be used, before anything is loaded; creates nothing.

    Raises:
        ConfigError: it holds a run and `resume` is off, or not one of `config`, simulated or `at_sites`, or cannot be
            written.
    """
    held = RunFolder.read(folder) if (folder / "config.json").is_file() else None
    if held is not None and not resume:
        raise ConfigError(
            f"--out {folder} holds a run already. Continue it with `{held.go_on}`, or choose another folder."
        )
    if held is not None and held.partition and held.is_across_sites != at_sites:
        raise ConfigError(f"{folder} holds a run of another kind, which goes on with `{held.go_on}`.")
    if held is not None and parse_config(held.run) != config:
        raise ConfigError(f"{folder} holds the run of another configuration. Choose another folder for this one.")
    existing = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    try:
        # What a run leaves that was killed before its first file was whole has a dot in front.
        if not resume and existing == folder and any(not item.name.startswith(".") for item in folder.iterdir()):
            raise ConfigError(f"--out {folder} holds other files already. Choose a new or empty folder.")
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise ConfigError(
            f"--out {folder} cannot be written: {existing}: {error.strerror}. Choose another folder."
        ) from error


def describe_run(
    config: RunConfig, model: StackedModel, weights_digest: str, recipe: str, plugin_files: Sequence[Path]
) -> dict[str, Any]:
    """Return the content of config.json."""
    return {
        "config": config.to_json(),
        "recipe": recipe,
        "plugin_files": [str(file) for file in plugin_files],
        # What is a folder or file here now may be gone, or be called otherwise, when somebody reads this.
        "on_hub": {
            "model": not config.model.path.startswith("builtin:") and not Path(config.model.path).exists(),
            "data": is_hub_name(config.data.path),
        },
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
            "weights_sha256": weights_digest,
        },
    }


def _start_folder(folder: Path, data: FederatedData, described: Mapping[str, Any]) -> None:
    """Write config.json and partition.json, or make sure that those of a resumed run still hold.

    Raises:
        DataError, EngineError: the rows, the base's weights or its precision are others than the run was started with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    partition = folder / "partition.json"
    if not partition.is_file():
        write_json(folder / "config.json", described)
        write_json(partition, data.summary)
        return
    check_base(folder, described)
    if json.loads(partition.read_text(encoding="utf-8"))["fingerprint"] != data.summary["fingerprint"]:
        raise DataError(
            f"{folder} was started on other rows: what [data] path = {described['config']['data']['path']!r} gives now "
            "differs. Restore the data, or start a new run."
        )


def check_base(folder: Path, described: Mapping[str, Any]) -> None:
    """Refuse to go on with the run in `folder` on a base of other weights or precision than it was started on.

    Raises:
        EngineError: what `described`, the content of config.json, says of the base is not what the file says.
    """
    started = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for what, table, key in (("precision", "hardware", "dtype"), ("weights", "model", "weights_sha256")):
        if started[table].get(key) != described[table][key]:
            raise EngineError(
                f"{folder} was started on a base of other {what}: [model] path = "
                f"{described['config']['model']['path']!r} has {key} {described[table][key]} now and had "
                f"{started[table].get(key)}. Restore the base (or the kind of machine), or start a new run."
            )


def _round_tokens(config: RunConfig, examples: Sequence[EncodedExample]) -> float:
    """Return the tokens that a client is expected to train on in a round."""
    passes = config.client.num_steps(len(examples)) / -(-len(examples) // config.client.batch_size)
    return passes * sum(example.num_trained for example in examples)


class Watch:
    """Wall and CPU seconds since the last lap, and the process's peak memory."""

    def __init__(self) -> None:
        self._wall, self._cpu = time.perf_counter(), time.process_time()

    def lap(self, num_tokens: int) -> dict[str, float]:
        wall, cpu = time.perf_counter(), time.process_time()
        seconds, cpu_seconds = wall - self._wall, cpu - self._cpu
        self._wall, self._cpu = wall, cpu
        unit = 1 if sys.platform == "darwin" else 1024
        return {
            "seconds": round(seconds, 3),
            "cpu_seconds": round(cpu_seconds, 3),
            "tokens_per_second": round(num_tokens / seconds, 1),
            "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit,
        }
