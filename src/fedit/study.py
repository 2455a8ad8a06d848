"""A study: a grid of runs over several seeds, and one table of what came out.

A study is a TOML file. Its axes have named choices, each a few overrides of the recipe; every combination of choices is
run with every seed:

    recipe = "default"
    seeds = [0, 1, 2]
    [override]                # of all runs
    "client.moments" = "reset"
    [axes.rule]
    fedit = { "aggregation.name" = "fedit" }
    ffa-lora = { "aggregation.name" = "ffa-lora" }
    [axes.split]
    shards = {}
    dirichlet = { "partition.name" = "dirichlet", "partition.alpha" = 0.1 }
    [reference]               # the runs that the others are compared with, which alone train the baselines
    rule = "fedit"

Every run is an ordinary `fedit run` in a process of its own, so that one that fails takes no other with it.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fedit.config import RunConfig, Table, explain, load_config, parse_config, shipped_studies
from fedit.files import folder_name, write_atomically, write_json
from fedit.interfaces import ConfigError, did_you_mean
from fedit.report import RunFolder
from fedit.report.format import MISSING, size

Overrides = dict[str, Any]


class StudyConfig(Table):
    """The content of a study file."""

    recipe: str = "default"
    """A shipped recipe, or a TOML file, as seen from the working directory."""
    seeds: tuple[int, ...] = Field(default=(0, 1, 2), min_length=1)
    override: Overrides = Field(default_factory=dict)
    """Keys of the recipe that all runs change."""
    axes: dict[str, dict[str, Overrides]] = Field(min_length=1)
    """By axis and choice, the keys of the recipe that the choice changes."""
    reference: dict[str, str] = Field(default_factory=dict)
    """The choices whose runs train the baselines; each of the others is compared with the one of the same seed and the
    same choices on all other axes. Empty: every run trains its own."""

    @field_validator("seeds")
    @classmethod
    def _once(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is named twice")
        return seeds

    @model_validator(mode="after")
    def _quoted(self) -> Self:
        for key, value in itertools.chain(
            self.override.items(), *(keys.items() for choices in self.axes.values() for keys in choices.values())
        ):
            if isinstance(value, dict) and "." not in key:
                inner = f"{key}.{next(iter(value), '...')}"
                raise ValueError(f'{key}: a table would replace the whole of it. Quote the key: "{inner}" = ...')
        return self


@dataclass(frozen=True)
class StudyRun:
    """One run of a study."""

    choices: Mapping[str, str]
    """By axis"""
    seed: int
    overrides: Sequence[str]
    """As for ``-o``"""
    config: RunConfig
    folder: Path
    measured: Mapping[str, Any] | None = None
    """What study.json knows of the run, whose folder may be gone."""

    @property
    def label(self) -> str:
        return " · ".join([*self.choices.values(), f"seed {self.seed}"])


def load_study(file: str) -> StudyConfig:
    """Read a study: a TOML file, or the name of a shipped one.

    Raises:
        ConfigError: naming each wrong key.
    """
    path = Path(file) if file.endswith(".toml") else shipped_studies().get(file)
    if path is None:
        raise ConfigError(f"No shipped study is named {file!r}. {did_you_mean(file, shipped_studies())}")
    try:
        study = StudyConfig.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise ConfigError(f"Study {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Study {path} is not valid TOML: {error}.") from error
    except ValidationError as error:
        raise ConfigError(explain(error, StudyConfig)) from error
    for axis, choice in study.reference.items():
        if axis not in study.axes:
            raise ConfigError(f"[reference]: no axis is named {axis!r}. {did_you_mean(axis, study.axes)}")
        if choice not in study.axes[axis]:
            raise ConfigError(
                f"[reference] {axis}: no choice is named {choice!r}. {did_you_mean(choice, study.axes[axis])}"
            )
    return study


def plan(study: StudyConfig, folder: Path, overrides: Sequence[str], plugin_files: Sequence[Path]) -> list[StudyRun]:
    """Return all runs, those that others are compared with first, each checked as `fedit run` checks it.

    What ``study.json`` in `folder` says of a run of this configuration counts as its result.

    Raises:
        ConfigError: a combination of choices cannot run, or its folder holds another configuration's run.
    """
    runs = []
    known = {(*run["choices"].values(), run["seed"]): run for run in _known(folder / "study.json")}
    for seed, names in itertools.product(study.seeds, itertools.product(*study.axes.values())):
        choices = dict(zip(study.axes, names, strict=True))
        keys = dict(study.override)
        for axis, choice in choices.items():
            keys |= study.axes[axis][choice]
        given = [*(f"{key}={_toml(value)}" for key, value in keys.items()), *overrides]
        if not _is_reference(study, choices):
            given.append("evaluation.baselines=false")
        place = folder.joinpath("runs", *map(folder_name, choices.values()), str(seed))
        try:
            config = load_config(study.recipe, [*given, f"seed={seed}"], plugin_files)
        except ConfigError as error:
            error.add_note(f"In the study's run {' · '.join(choices.values())}.")
            raise
        if (place / "config.json").is_file() and parse_config(RunFolder.read(place).run) != config:
            raise ConfigError(
                f"{place} holds the run of another configuration. Choose another --out for the changed study, or "
                "delete that folder to run it again."
            )
        found = known.get((*names, seed))
        if found is not None and found["config"] != config.digest():
            raise ConfigError(
                f"{folder / 'study.json'} holds another configuration's result of {' · '.join(names)}, seed {seed}. "
                "Choose another --out for the changed study, or delete that result to run it again."
            )
        runs.append(StudyRun(choices, seed, given, config, place, found))
    return sorted(runs, key=lambda run: not _is_reference(study, run.choices))


def _known(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_text(encoding="utf-8"))["runs"] if path.is_file() else []


def run_study(
    study: StudyConfig,
    runs: Sequence[StudyRun],
    folder: Path,
    jobs: int,
    plugin_files: Sequence[Path],
    say: Callable[[str], None],
) -> int:
    """Run what is not finished, `jobs` runs at a time, and return how many failed; `say` is told each end, and the
    table in `folder` has what is finished so far.
    """
    if jobs < 1:
        raise ConfigError(f"--jobs {jobs}: expected 1 or more.")
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads, **os.environ}

    def finish(run: StudyRun) -> str | None:
        if run.measured is not None or (run.folder / "evaluation.json").is_file():
            return None
        if (run.folder / "config.json").is_file():
            arguments = ["--resume", str(run.folder)]
        else:
            changes = [part for override in run.overrides for part in ("-o", override)]
            arguments = [study.recipe, *changes, "--seed", str(run.seed), "--out", str(run.folder)]
        arguments += [part for file in plugin_files for part in ("--plugin", str(file))]
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = run.folder.with_name(f"{run.folder.name}.log")
        with log.open("w", encoding="utf-8") as output:
            command = [sys.executable, "-m", "fedit.cli", "run", *arguments]
            status = subprocess.run(command, stdout=output, stderr=output, env=environment, check=False).returncode
        return None if status == 0 else f"exit status {status}, see {log}"

    num_failed = 0
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(finish, run): run for run in runs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                failure = future.result()
                num_failed += failure is not None
                write_study(folder, study, measure(study, runs))
                say(f"{done} of {len(runs)}: {futures[future].label}{f' failed: {failure}' if failure else ''}")
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return num_failed


def _is_reference(study: StudyConfig, choices: Mapping[str, str]) -> bool:
    return all(choices[axis] == choice for axis, choice in study.reference.items())


def _toml(value: Any) -> str:
    """Return a value as TOML writes it in one line."""
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(key)} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


# -------------------------------------------------------------------------------------------------------- the table

MEASURES = {
    "response_loss": ("Response loss", 3),
    "difference": ("Difference", 4),
    "worst_client": ("Worst client", 3),
    "exact_match": ("Exact match", 3),
    "gap_closed": ("Gap closed", 2),
    "preference_accuracy": ("Preferred", 3),
    "attack_success": ("Attack success", 3),
    "bytes_up": ("Up", None),
    "bytes_down": ("Down", None),
    "aggregation_s": ("Server, s", 3),
    "aggregation_loss": ("Aggregation loss", 4),
}
"""By name, the heading and the digits (None: bytes). The difference is that of the response loss to the reference run,
seed by seed, so that what seeds have in common cancels. Bytes are per client and round, both ways as messages; the
server's seconds are the median round's, for the aggregation; the aggregation loss is the mean over rounds."""


def measure(study: StudyConfig, runs: Sequence[StudyRun]) -> list[dict[str, Any]]:
    """Return the measures of every run that is finished: its choices, its seed and what of `MEASURES` it has."""
    measured = [known for run in runs if (known := _measured(run)) is not None]
    references = {_reference_key(study, run): run for run in measured if _is_reference(study, run["choices"])}
    for run in measured:
        reference = references.get(_reference_key(study, run), {})
        if study.reference and reference is not run and {"response_loss"} <= reference.keys() & run.keys():
            run["difference"] = run["response_loss"] - reference["response_loss"]
        for name in ("base", "local", "central"):
            if name in reference:
                run[name] = reference[name]
        loss, local, central = (run.get(name) for name in ("response_loss", "local", "central"))
        if loss is not None and local is not None and central is not None and local > central:
            run["gap_closed"] = (local - loss) / (local - central)
    return measured


def _measured(run: StudyRun) -> dict[str, Any] | None:
    if (run.folder / "evaluation.json").is_file():
        described = {"choices": dict(run.choices), "seed": run.seed, "config": run.config.digest()}
        return described | _of_run(RunFolder.read(run.folder))
    return None if run.measured is None else dict(run.measured)


def _reference_key(study: StudyConfig, run: Mapping[str, Any]) -> tuple[Any, ...]:
    return run["seed"], *(choice for axis, choice in run["choices"].items() if axis not in study.reference)


def _of_run(run: RunFolder) -> dict[str, float]:
    evaluation = run.evaluation
    federated = evaluation["models"]["federated"]
    contacted = sum(len(line["cohort"]) for line in run.rounds)
    client_rounds = sum(len(line["cohort"]) - len(line["failures"]) for line in run.rounds)
    losses = [line["aggregation_loss"] for line in run.rounds if line["aggregation_loss"] is not None]
    seconds = [line["aggregation_seconds"] for line in run.timings if "aggregation_seconds" in line]
    values = {
        "response_loss": federated["response_loss"]["all"],
        "worst_client": next(
            (
                evaluation[f"{kind}_worst_client"]["response_loss"]
                for kind in ("federated", "personal")
                if f"{kind}_worst_client" in evaluation
            ),
            None,
        ),
        "exact_match": federated.get("exact_match", {}).get("all"),
        "preference_accuracy": evaluation.get("preference_accuracy", {}).get("federated"),
        "attack_success": evaluation.get("attack", {}).get("success", {}).get("federated"),
        "bytes_up": sum(line["bytes_up"] for line in run.rounds) / max(1, client_rounds),
        "bytes_down": sum(line["bytes_down"] for line in run.rounds) / max(1, contacted),
        "aggregation_s": statistics.median(seconds) if seconds else None,
        "aggregation_loss": statistics.fmean(losses) if losses else None,
        "tokens": federated["tokens"],
    }
    for name in ("base", "local", "central"):
        values[name] = evaluation["models"].get(name, {}).get("response_loss", {}).get("all")
    return {name: value for name, value in values.items() if value is not None}


def table(study: StudyConfig, measured: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]]]:
    """Return headings and lines of the table: a line for each combination of choices, mean ± standard deviation over
    seeds. Measures that no run has are left out.
    """
    shown = [name for name in MEASURES if any(name in run for run in measured)]
    lines = []
    for choices, group in _by_choices(study, measured):
        cells = [_mean_and_deviation([run[name] for run in group if name in run], MEASURES[name][1]) for name in shown]
        lines.append([*choices, str(len(group)), *cells])
    return [*study.axes, "Seeds", *(MEASURES[name][0] for name in shown)], lines


def _by_choices(
    study: StudyConfig, measured: Sequence[Mapping[str, Any]]
) -> Iterator[tuple[tuple[str, ...], list[Mapping[str, Any]]]]:
    for choices in itertools.product(*study.axes.values()):
        group = [run for run in measured if tuple(run["choices"].values()) == choices]
        if group:
            yield choices, group


def _mean_and_deviation(values: Sequence[float], digits: int | None) -> str:
    if not values:
        return MISSING
    if digits is None:
        return size(statistics.fmean(values))
    mean = f"{statistics.fmean(values):,.{digits}f}"
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{mean} ± {deviation:,.{digits}f}" if deviation else mean


def write_study(folder: Path, study: StudyConfig, measured: Sequence[Mapping[str, Any]]) -> Path:
    """Write study.json, every run's measures, and study.md, the table; return the latter's path."""
    headings, lines = table(study, measured)
    rows = [headings, ["---"] * len(headings), *lines]
    write_json(folder / "study.json", {"study": study.model_dump(mode="json"), "runs": list(measured)})
    markdown = folder / "study.md"
    write_atomically(markdown, "".join(f"| {' | '.join(row)} |\n" for row in rows).encode())
    return markdown
