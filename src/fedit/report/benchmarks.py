"""Benchmarks: ``benchmarks.json`` as a table, for the page and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.table import Table
from rich.text import Text

from fedit.report.format import MISSING, MODEL_LABELS, number, signed, signed_interval

Tasks = Mapping[str, Mapping[str, Any]]


def benchmarks(tasks: Tasks) -> dict[str, Any] | None:
    """Return what the page's section shows; None: the run was evaluated on no benchmark."""
    shown = _shown(tasks)
    if not shown:
        return None
    models, others = _models(shown), _others(shown)
    return {
        "models": [_model_label(name) for name in models],
        "others": [_model_label(name.partition("_minus_")[2]) for name in others],
        "lines": [
            {
                "task": name,
                "about": _about(task),
                "metric": metric_label(metric),
                "values": [_value(metric["models"].get(model)) for model in models],
                "is_compared": bool(metric["differences"]),
                "differences": [_difference(metric["differences"].get(other)) for other in others],
            }
            for name, task in shown.items()
            for metric in task["metrics"]
        ],
        "num_hidden": len(tasks) - len(shown),
        "versions": sorted({task["lm_eval"] for task in shown.values()}),
    }


def benchmarks_table(tasks: Tasks) -> Table:
    """Return one line for each metric of each task: all models, with standard errors."""
    shown = _shown(tasks)
    table = Table(title="Benchmarks (± standard error)", title_justify="left")
    table.add_column("Task")
    table.add_column("Metric", no_wrap=True)
    models = _models(shown)
    for model in models:
        table.add_column(Text(_model_label(model)), justify="right")
    for name, task in shown.items():
        for place, metric in enumerate(task["metrics"]):
            about = Text.assemble(name, (f"\n{_rows(task)}", "dim")) if place == 0 else Text()
            values = [_value(metric["models"].get(model)) for model in models]
            cells = (Text(f"{value}\n± {stderr}" if stderr else value) for value, stderr in values)
            table.add_row(about, Text(metric_label(metric)), *cells)
    if hidden := len(tasks) - len(shown):
        table.caption = f"{hidden} tasks of these groups are in benchmarks.json"
        table.caption_justify = "left"
    return table


def metric_label(metric: Mapping[str, Any]) -> str:
    """Return a metric's name, with the filter that its answers passed and whether lower is better."""
    chosen = "" if metric["filter"] == "none" else f" ({metric['filter']})"
    return f"{metric['name']}{chosen}{', lower is better' if metric['higher_is_better'] is False else ''}"


def _shown(tasks: Tasks) -> Tasks:
    """Leave out the tasks whose group has a number of its own."""
    return {name: task for name, task in tasks.items() if task["group"] not in tasks}


def _models(tasks: Tasks) -> list[str]:
    return list(
        dict.fromkeys(name for task in tasks.values() for metric in task["metrics"] for name in metric["models"])
    )


def _others(tasks: Tasks) -> list[str]:
    return list(
        dict.fromkeys(name for task in tasks.values() for metric in task["metrics"] for name in metric["differences"])
    )


def _model_label(name: str) -> str:
    kind, _, client = name.partition("/")
    return f"{MODEL_LABELS.get(kind, kind)} ({client})" if client else MODEL_LABELS.get(kind, kind)


def _about(task: Mapping[str, Any]) -> str:
    version = f"version {task['version']}" if task["version"] is not None else ""
    template = f"template {task['template']}" if task["template"] else "no template"
    return ", ".join(part for part in (_rows(task), version, template) if part)


def _rows(task: Mapping[str, Any]) -> str:
    rows = f"{task['num_rows']:,}"
    if task["of_rows"] not in {None, task["num_rows"]}:
        rows += f" of {task['of_rows']:,}"
    shots = "" if task["num_fewshot"] is None else f", {task['num_fewshot']}-shot"
    return f"{rows} rows{shots}"


def _value(measured: Mapping[str, float | None] | None) -> tuple[str, str]:
    """Return a number and its standard error, where there is one."""
    if measured is None:
        return MISSING, ""
    return number(measured["value"]), "" if measured["stderr"] is None else number(measured["stderr"])


def _difference(measured: Mapping[str, Any] | None) -> tuple[str, str]:
    if measured is None:
        return MISSING, ""
    return signed("", measured["value"]), signed_interval("", measured["confidence"])
