"""A study: a grid of runs over several seeds, and their comparison.

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
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, field_validator, model_validator

from fedit.comparison import GONE, Comparison, Difference, Group, MeasuredRun, compare, measure_run, to_markdown
from fedit.config import RunConfig, Table, explain, load_config, parse_config, shipped_studies, toml
from fedit.files import folder_name, write_atomically, write_json
from fedit.interfaces import ConfigError, did_you_mean
from fedit.report import RunFolder
from fedit.report.folder import flatten, read_json

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


RESULT = "study.json"


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
    known = {_key(run): run for run in read_json(folder / RESULT).get("runs", ())}
    for seed, names in itertools.product(study.seeds, itertools.product(*study.axes.values())):
        choices = dict(zip(study.axes, names, strict=True))
        keys = dict(study.override)
        for axis, choice in choices.items():
            keys |= study.axes[axis][choice]
        given = [*(f"{key}={toml(value)}" for key, value in keys.items()), *overrides]
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
                f"{folder / RESULT} holds another configuration's result of {' · '.join(names)}, seed {seed}. "
                "Choose another --out for the changed study, or delete that result to run it again."
            )
        runs.append(StudyRun(choices, seed, given, config, place, found))
    return sorted(runs, key=lambda run: not _is_reference(study, run.choices))


def _key(run: Mapping[str, Any]) -> tuple[Any, ...]:
    """Return what a run in study.json is known by."""
    return (*run["choices"].values(), run["seed"])


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

    waiting = [run for run in runs if run.measured is None and not (run.folder / "evaluation.json").is_file()]

    def finish(run: StudyRun) -> str | None:
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
        futures = {pool.submit(finish, run): run for run in waiting}
        try:
            for done, future in enumerate(as_completed(futures), start=len(runs) - len(waiting) + 1):
                failure = future.result()
                num_failed += failure is not None
                write_study(folder, study, runs, compare_study(study, runs, folder))
                say(f"{done} of {len(runs)}: {futures[future].label}{f' failed: {failure}' if failure else ''}")
        except KeyboardInterrupt:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return num_failed


def _is_reference(study: StudyConfig, choices: Mapping[str, str]) -> bool:
    return all(choices[axis] == choice for axis, choice in study.reference.items())


# --------------------------------------------------------------------------------------------------------- the result


def compare_study(study: StudyConfig, runs: Sequence[StudyRun], folder: Path) -> Comparison:
    """Return the runs that are finished, a group for each combination of choices.

    Where folders are gone the paired intervals are those that ``study.json`` has.
    """
    groups: dict[tuple[str, ...], list[StudyRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.choices.values()), []).append(run)
    result = []
    for names in itertools.product(*study.axes.values()):
        measured = [found for run in groups.get(names, ()) if (found := _measured(run)) is not None]
        if measured:
            choices = dict(zip(study.axes, names, strict=True))
            reference = " · ".join((choices | study.reference).values())
            settings = flatten(groups[names][0].config.to_json())
            settings = {key: settings[key] for key in settings if key not in {"seed", "evaluation.baselines"}}
            result.append(Group(" · ".join(names), choices, measured, settings, reference))
    num_finished = sum(len(group.runs) for group in result)
    so_far = "" if num_finished == len(runs) else f", {num_finished} of {len(runs)} runs"
    known = {
        (group["label"], group["model"]): Difference(group["metrics"], group["notes"])
        for group in read_json(folder / RESULT).get("groups", ())
        if "metrics" in group
    }
    return compare(f"Study {folder.name}{so_far}", result, known)


def _measured(run: StudyRun) -> MeasuredRun | None:
    if (run.folder / "evaluation.json").is_file():
        values = measure_run(RunFolder.read(run.folder))
        if values["test_rows"] == GONE and run.measured is not None:  # what they were is known from before
            values |= {key: run.measured[key] for key in ("test_rows", "test_tokens") if key in run.measured}
        return MeasuredRun(run.seed, run.folder, values)
    if run.measured is None:
        return None
    values = {key: value for key, value in run.measured.items() if key not in {"choices", "seed", "config"}}
    return MeasuredRun(run.seed, run.folder, values)


def write_study(folder: Path, study: StudyConfig, runs: Sequence[StudyRun], comparison: Comparison) -> None:
    """Write study.json, which has every run's measures and what the comparison found, and study.md, the table.

    What study.json has of runs that are no longer in the study stays there: their folders may be gone.
    """
    digests = {str(run.folder): run.config.digest() for run in runs}
    content = comparison.to_json()
    for line in content["runs"]:
        line["config"] = digests[line.pop("folder")]
    planned = {(*run.choices.values(), run.seed) for run in runs}
    content["runs"] += [run for run in read_json(folder / RESULT).get("runs", ()) if _key(run) not in planned]
    write_json(folder / RESULT, {"study": study.model_dump(mode="json"), **content})
    write_atomically(folder / "study.md", to_markdown(comparison).encode())
