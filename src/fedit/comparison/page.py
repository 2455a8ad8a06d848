"""A comparison -> one page, a CSV file and a LaTeX table, side by side in a folder."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fedit.comparison import plots
from fedit.comparison.finding import state_differences
from fedit.comparison.groups import Comparison, Group, MeasuredRun
from fedit.comparison.measures import MEASURES
from fedit.comparison.tables import (
    best_groups,
    heading,
    interval_text,
    mean_and_deviation,
    notes,
    plain,
    shown_measures,
    to_csv,
    to_latex,
)
from fedit.config import override_value
from fedit.files import write_atomically
from fedit.report.format import METRIC_LABELS, MISSING
from fedit.report.render import fill


def write_comparison(comparison: Comparison, folder: Path, name: str) -> Path:
    """Write ``<name>.html``, ``<name>.csv`` and ``<name>.tex`` into a folder, and return the page's path."""
    page = folder / f"{name}.html"
    write_atomically(page, render(comparison, folder, name).encode())
    write_atomically(folder / f"{name}.csv", to_csv(comparison).encode())
    write_atomically(folder / f"{name}.tex", to_latex(comparison).encode())
    return page


def render(comparison: Comparison, folder: Path, name: str) -> str:
    """Return the page, with links as seen from `folder`."""
    series = plots.choose_series(comparison)
    measures = shown_measures(comparison)
    own = [key for key in measures if any(key in run.values for group in comparison.trained for run in group.runs)]
    return fill(
        "compare.html.j2",
        {
            "title": comparison.title,
            "name": name,
            "finding": state_differences(comparison),
            "axes": comparison.axes,
            "headings": {key: heading(measure) for key, measure in measures.items()},
            "better": {key: measure.better for key, measure in measures.items()},
            "lines": _lines(comparison, series, folder),
            "paired": _paired(comparison),
            "notes": notes(comparison),
            "settings": _settings(comparison),
            "categories": _categories(comparison),
            "run_headings": {key: heading(measures[key]) for key in own},
            "groups": [_group(group, own, folder) for group in comparison.trained],
            "num_grey": len(comparison.trained) - len(series),
            "max_bars": plots.MAX_BARS,
            "is_training_loss": plots.curve_key(comparison) == "train_loss",
            "plots": {
                "rounds": plots.rounds_figure(comparison, series),
                "bytes": plots.bytes_figure(comparison, series),
                "worst": plots.worst_figure(comparison),
                **{metric: plots.categories_figure(comparison, series, metric) for metric in METRIC_LABELS},
            },
        },
    )


def _lines(comparison: Comparison, series: plots.Series, folder: Path) -> list[dict[str, Any]]:
    """Return the lines of the table: each number with where it comes from."""
    measures = shown_measures(comparison)
    places = {group.label: place for place, group in enumerate(comparison.trained)}
    best = {key: best_groups(comparison, key) for key in measures}
    lines = []
    for index, group in enumerate(comparison.groups):
        cells = []
        for key in measures:
            mean, _, deviation = mean_and_deviation(group, key).partition(" ± ")
            small = f"± {deviation}" if deviation else ""
            bounds = interval_text(group) if key == "difference" else ""
            cells.append({"mean": mean, "small": [small, bounds], "is_best": index in best[key], "key": key})
        chip = f"series{series[group.label]}" if group.label in series else "grey"
        lines.append(
            {
                "choices": list(group.choices.values()),
                "chip": group.model if group.is_baseline else chip,
                "is_baseline": group.is_baseline,
                "is_reference": group.label in comparison.references and not group.is_baseline,
                "direction": 0 if group.difference is None else group.difference.direction,
                "place": places[group.reference] if group.is_baseline else places[group.label],
                "seeds": [{"seed": run.seed, "link": _link(run, folder)} for run in group.runs],
                "cells": cells,
            }
        )
    return lines


def _paired(comparison: Comparison) -> dict[str, Any] | None:
    """Return the differences in all metrics; None: the loss, which the first table has, is all there is."""
    groups = [group for group in comparison.groups if group.difference is not None and group.difference.metrics]
    found = [metric for metric in METRIC_LABELS if any(_metrics(group).get(metric) for group in groups)]
    if found in ([], ["response_loss"]):
        return None
    lines = []
    for group in groups:
        cells = []
        for metric in found:
            measure = MEASURES["difference" if metric == "response_loss" else metric]
            one = _metrics(group).get(metric)
            deviation = "" if one is None or not one["deviation"] else f"± {plain(measure, one['deviation'])}"
            text = MISSING if one is None else plain(measure, one["mean"])
            cells.append({"mean": text, "small": [deviation, interval_text(group, metric)]})
        lines.append({"label": group.label, "reference": group.reference, "cells": cells})
    return {"headings": [heading(MEASURES[metric]) for metric in found], "lines": lines}


def _metrics(group: Group) -> Any:
    return {} if group.difference is None else group.difference.metrics


def _settings(comparison: Comparison) -> dict[str, Any]:
    """Return the keys in which the configurations differ, and every group's values of them."""
    keys = comparison.differing()
    lines = [
        (group.label, [override_value(group.settings[key]) if key in group.settings else MISSING for key in keys])
        for group in comparison.trained
    ]
    return {"keys": keys, "lines": lines}


def _categories(comparison: Comparison) -> list[dict[str, Any]]:
    """Return a table for each metric: categories by groups."""
    tables = []
    for metric, label in METRIC_LABELS.items():
        lines = []
        for category in plots.categories_of(comparison, metric):
            values = [plots.by_category(group, metric, category) for group in comparison.trained]
            lines.append(
                (category, [plain(MEASURES[metric], sum(each) / len(each)) if each else MISSING for each in values])
            )
        if len(lines) > 1:
            groups = [group.label for group in comparison.trained]
            tables.append({"label": label, "heading": heading(MEASURES[metric]), "groups": groups, "lines": lines})
    return tables


def _group(group: Group, measures: Sequence[str], folder: Path) -> dict[str, Any]:
    """Return a group's runs one by one."""
    return {
        "label": group.label,
        "runs": [
            {
                "seed": run.seed,
                "cells": [plain(MEASURES[key], run.values[key]) if key in run.values else MISSING for key in measures],
                "link": _link(run, folder),
                "folder": str(run.folder),
                "command": run.values.get("command"),
            }
            for run in group.runs
        ],
    }


def _link(run: MeasuredRun, folder: Path) -> str | None:
    """Return the address of the run's report as seen from `folder`; None: the run's folder is gone."""
    report = run.folder / "report.html"
    if not report.is_file():
        return None
    return quote(Path(os.path.relpath(report.resolve(), folder.resolve())).as_posix())
