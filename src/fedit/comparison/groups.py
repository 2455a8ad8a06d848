"""Runs -> groups that differ by the seed alone."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from fedit.comparison.measures import measure_run
from fedit.config import override_value, parse_config
from fedit.interfaces import ConfigError, FeditError
from fedit.report import RunFolder
from fedit.report.folder import flatten
from fedit.report.format import MISSING


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: what is known of it, and where it is, or was."""

    seed: int
    folder: Path
    values: Mapping[str, Any]
    """As `measure_run` returns them, and what follows from the reference: ``difference``, ``gap_closed``"""


@dataclass(frozen=True)
class Difference:
    """How far a group is from its reference, over the seeds that both have."""

    metrics: Mapping[str, Mapping[str, Any]]
    """By metric: ``seeds``, ``by_seed``, ``mean``, ``deviation`` (None for one seed) and ``interval`` (or None)"""
    notes: Sequence[str]
    """Why seeds, metrics or intervals are left out"""

    @property
    def direction(self) -> int:
        """Whether the loss is lower (-1) or higher (1): the interval and all seeds say so; else 0."""
        loss = self.metrics.get("response_loss")
        if loss is None or loss["interval"] is None:
            return 0
        told = [*loss["interval"], *loss["by_seed"]]
        return -1 if max(told) < 0 else 1 if min(told) > 0 else 0


@dataclass(frozen=True)
class Group:
    """Runs that differ by the seed alone; or the base or a baseline of such runs."""

    label: str
    choices: Mapping[str, str]
    """What distinguishes it from the others, a column each"""
    runs: Sequence[MeasuredRun]
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The configuration, without the seed: key.sub -> value"""
    reference: str = ""
    """The label of the group that it is compared with; its own, where it is compared with its own baselines alone"""
    model: str = "federated"
    difference: Difference | None = None

    @property
    def seeds(self) -> list[int]:
        return [run.seed for run in self.runs]

    @property
    def is_baseline(self) -> bool:
        return self.model != "federated"

    def measured(self, name: str) -> list[float]:
        """Return the values of a measure, of the runs that have it."""
        return [run.values[name] for run in self.runs if name in run.values]

    def mean(self, name: str) -> float | None:
        """Return a measure's mean over the runs; None: none has it."""
        values = self.measured(name)
        return statistics.fmean(values) if values else None


@dataclass(frozen=True)
class Comparison:
    """Groups of runs, and what differs between them."""

    title: str
    axes: Sequence[str]
    """The keys of every group's choices"""
    groups: Sequence[Group]
    """The base and the baselines of a reference stand behind the others"""

    @property
    def trained(self) -> list[Group]:
        """The groups without the baselines."""
        return [group for group in self.groups if not group.is_baseline]

    @property
    def references(self) -> set[str]:
        """The labels of the groups that others are compared with."""
        return {group.reference for group in self.trained if group.reference != group.label}

    def differing(self) -> list[str]:
        """Return the keys of the configuration in which groups differ."""
        return _differing([group.settings for group in self.trained])

    def to_json(self) -> dict[str, Any]:
        """Return groups with their differences, and all runs."""
        return {
            "groups": [
                {"label": group.label, "model": group.model, "choices": dict(group.choices), "seeds": group.seeds}
                | ({} if group.difference is None else {"reference": group.reference, **vars(group.difference)})
                for group in self.groups
            ],
            "runs": [
                {"choices": dict(group.choices), "seed": run.seed, "folder": str(run.folder), **run.values}
                for group in self.trained
                for run in group.runs
            ],
        }


# ------------------------------------------------------------------------------------------------- folders -> groups


def group_runs(folders: Sequence[Path]) -> list[Group]:
    """Return the runs in `folders`, grouped by their configuration; the first group is the reference of all.

    Raises:
        ConfigError: a folder is no finished run, is given twice, or two runs have the same configuration and seed.
    """
    places = [folder.resolve() for folder in folders]
    for index, folder in enumerate(folders):
        if places[index] in places[:index]:
            raise ConfigError(f"{folder} is given twice. Give every run once.")
    groups: dict[str, tuple[dict[str, Any], RunFolder, dict[int, MeasuredRun]]] = {}
    for folder in folders:
        run = _finished(folder)
        settings = _settings(run)
        seed = settings.pop("seed", 0)
        settings.pop("evaluation.baselines", None)  # says what else is trained, and changes nothing
        _, _, runs = groups.setdefault(_spelled(settings), (settings, run, {}))
        if seed in runs:
            raise ConfigError(
                f"{folder} and {runs[seed].folder} are runs of the same configuration and seed. Leave one of them out."
            )
        runs[seed] = MeasuredRun(seed, folder, measure_run(run))
    keys = _distinguishing([settings for settings, _, _ in groups.values()])
    result = []
    for settings, run, runs in groups.values():
        choices = {key: override_value(settings[key]) if key in settings else MISSING for key in keys}
        label = ", ".join(f"{key}={value}" for key, value in choices.items())
        recipe = run.config.get("recipe") or "run"
        in_order = [runs[seed] for seed in sorted(runs)]
        result.append(Group(label or recipe, choices or {"recipe": recipe}, in_order, settings))
    return [replace(group, reference=result[0].label) for group in result]


def _finished(folder: Path) -> RunFolder:
    run = RunFolder.read(folder)
    if "federated" not in run.evaluation.get("models", {}):
        if run.is_across_sites:
            raise ConfigError(f"{folder} is a run across sites, whose held-out rows are not here. Leave it out.")
        raise ConfigError(
            f"{folder} is not evaluated: {len(run.rounds)} of {run.run.get('rounds', 0)} rounds are done. Go on with "
            f"`{run.go_on}`, or leave it out."
        )
    return run


def _settings(run: RunFolder) -> dict[str, Any]:
    """Return the run's configuration, and the base's weights; keys that fedit has gained since have their defaults."""
    try:
        settings = flatten(parse_config(run.run).to_json())
    except FeditError:  # a plug-in that is not there, a key that is no more: the run is finished all the same
        settings = run.settings
    weights = run.config.get("model", {}).get("weights_sha256", "")
    return {**settings, "model.weights": weights[:12]}


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for each in settings for key in each)
    return [key for key in keys if len({_spelled(each.get(key)) for each in settings}) > 1]


def _spelled(value: Any) -> str:
    """Return a text that is the same for the same settings: in whatever order, left out or none."""
    if isinstance(value, Mapping):
        value = {key: each for key, each in value.items() if each is not None}
    return json.dumps(value, sort_keys=True)


def _distinguishing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return few keys that no two of `settings` agree in: always the one that splits most; names of plug-ins first."""
    candidates = sorted(_differing(settings), key=lambda key: not key.endswith(".name"))
    chosen: list[str] = []

    def num_classes(keys: Sequence[str]) -> int:
        return len({_spelled([each.get(key) for key in keys]) for each in settings})

    while num_classes(chosen) < len(settings):
        chosen.append(max(candidates, key=lambda key: num_classes([*chosen, key])))
    return chosen
