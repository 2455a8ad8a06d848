"""Benchmarks of a run folder: lm-eval's numbers of all its models, and what differs between them."""

from __future__ import annotations

import json
import logging
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from lm_eval.evaluator import evaluate

from fedit.benchmarks.harness import HarnessModel
from fedit.benchmarks.tasks import load_tasks
from fedit.evaluation.metrics import LOCAL_PREFIX, NUM_RESAMPLES, mean_interval
from fedit.files import folder_name, write_atomically, write_json
from fedit.interfaces import ConfigError
from fedit.report import RunFolder, write_report
from fedit.run_models import BASE, FEDERATED, LOCAL, RunModels, model_names, resolve_names

_log = logging.getLogger(__name__)

SEED = 1234
"""lm-eval's own, of the examples in prompts"""


@dataclass(frozen=True)
class Wanted:
    """What is to be evaluated, and how the models are asked."""

    tasks: Sequence[str]
    """Names, patterns or YAML files (`load_tasks`)"""
    models: Sequence[str] = ()
    """`resolve_names`; none: the base, the median local-only model, the centralised and the federated one"""
    num_fewshot: int | None = None
    """Examples in a prompt; None: as the task says"""
    limit: int | None = None
    """Rows of each task, the first ones; None: all"""
    apply_template: bool = True
    """Ask in the template that the run was tuned with; else as lm-eval writes the prompt"""
    include: Sequence[Path] = ()
    data: Mapping[str, Path] = field(default_factory=dict)


def evaluate_run(folder: Path, wanted: Wanted, notify: Callable[[str], None] = lambda phase: None) -> dict[str, Any]:
    """Evaluate models of the run in `folder`, write ``benchmarks.json`` and the report again; return its tasks' part.

    What ``benchmarks.json`` holds of other tasks stays. Every row with its answers goes to
    ``benchmarks/<task>/<model>.jsonl``, as lm-eval logs it.

    Raises:
        ConfigError, DataError: a model, a task or its data cannot be had.
        EngineError: the base cannot be loaded, or is another than the run's.
    """
    for name, number, least in (("--limit", wanted.limit, 1), ("--fewshot", wanted.num_fewshot, 0)):
        if number is not None and number < least:
            raise ConfigError(f"{name} {number}: expected {least} or more.")
    names = resolve_names(folder, wanted.models or _usual(folder))
    seed = RunFolder.read(folder).run["seed"]
    notify("Finding the tasks")
    loaded = load_tasks(wanted.tasks, wanted.include, wanted.data, seed)
    for name, task in loaded["tasks"].items():
        _set_fewshot(name, task, wanted.num_fewshot)
    notify("Loading the models")
    models = RunModels.open(folder, names)
    notify(f"Asking {len(names)} models at once: {', '.join(loaded['tasks'])}")
    results = dict(_results(HarnessModel(models), loaded, wanted))
    template = models.config.data.template.name if wanted.apply_template else None
    about = {"template": template, "limit": wanted.limit, "lm_eval": version("lm-eval")}
    tasks = {name: {**entry, **about} for name, entry in combine(results, seed).items()}
    for model, result in results.items():
        for task, samples in result["samples"].items():
            lines = [json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in samples]
            path = folder / "benchmarks" / folder_name(task) / f"{folder_name(model)}.jsonl"
            write_atomically(path, "".join(lines).encode())
    written = {f"{folder_name(model)}.jsonl" for model in results}
    for task in next(iter(results.values()))["samples"]:
        for file in (folder / "benchmarks" / folder_name(task)).glob("*.jsonl"):
            if file.name not in written:  # of models that the task's new entry no longer has
                file.unlink()
    before = RunFolder.read(folder).benchmarks.get("tasks", {})
    write_json(folder / "benchmarks.json", {"tasks": {**before, **tasks}})
    write_report(folder)
    return tasks


def combine(results: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """Return, by task or group, what lm-eval measured of every model, and how the federated one differs from others.

    Differences are of the means over rows, with the 95% bootstrap interval over rows (paired: the rows are the same);
    of metrics that are no mean over rows there are none.
    """
    first = next(iter(results.values()))
    parents = {child: group for group, children in first["group_subtasks"].items() for child in children}
    aggregated = first.get("groups", {})
    combined = {}
    for task, measured in first["results"].items():
        keys = [key for key in measured if "," in key and "_stderr," not in key]
        if not keys:
            continue  # a group that only names its tasks
        rows = first["n-samples"].get(task, {"effective": measured.get("sample_len"), "original": None})
        combined[task] = {
            "version": first["versions"].get(task),
            "num_fewshot": first["n-shot"].get(task),
            "num_rows": rows["effective"],
            "of_rows": rows["original"],
            "group": parents.get(task) if parents.get(task) in aggregated else None,
            "metrics": [_metric(results, task, key, seed) for key in keys],
        }
    return combined


def _usual(folder: Path) -> list[str]:
    """Return the base, the median local-only model, the centralised and the federated one, as far as the run has them;
    where clients have models of their own instead of one for all, these.
    """
    known = model_names(folder)
    local = [LOCAL] if any(name.startswith(LOCAL_PREFIX) for name in known) else []
    others = [name for name in known if not name.startswith(LOCAL_PREFIX) and name != BASE]
    if FEDERATED in others:
        others = [name for name in others if "/" not in name]
    return [BASE, *local, *others]


def _set_fewshot(name: str, task: Any, num_fewshot: int | None) -> None:
    own = task.get_config("num_fewshot")
    if own == 0 and num_fewshot:
        _log.warning("Task %s takes no examples (num_fewshot: 0): --fewshot is not for it.", name)
    elif num_fewshot is not None or own is None:
        task.set_config(key="num_fewshot", value=num_fewshot or 0)


def _results(model: HarnessModel, loaded: Any, wanted: Wanted) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for name in model.names:
        model.name = name
        # Whatever a task draws, it draws for every model.
        random.seed(SEED)
        np.random.seed(SEED)  # noqa: NPY002 (tasks of lm-eval draw from numpy's global stream)
        for task in loaded["tasks"].values():
            task.set_fewshot_seed(seed=SEED)
        result = evaluate(
            lm=model,
            task_dict=loaded,
            limit=wanted.limit,
            bootstrap_iters=NUM_RESAMPLES,
            apply_chat_template=wanted.apply_template,
            fewshot_as_multiturn=wanted.apply_template,
        )
        assert result is not None
        yield name, result


def _metric(results: Mapping[str, Mapping[str, Any]], task: str, key: str, seed: int) -> dict[str, Any]:
    name, _, chosen = key.partition(",")
    first = next(iter(results.values()))
    values = {
        model: {
            "value": _number(result["results"][task][key]),
            "stderr": _number(result["results"][task].get(f"{name}_stderr,{chosen}")),
        }
        for model, result in results.items()
    }
    differences = {}
    rows = {model: _of_rows(result, task, key) for model, result in results.items()}
    for other in rows if FEDERATED in rows else ():
        one, two = rows[FEDERATED], rows[other]
        if other != FEDERATED and one is not None and two is not None:
            difference = one - two
            differences[f"{FEDERATED}_minus_{other}"] = {
                "value": float(difference.mean()),
                "confidence": mean_interval(difference, seed, f"{task},{key}"),
            }
    return {
        "name": name,
        "filter": chosen,
        "higher_is_better": first["higher_is_better"].get(task, {}).get(name),
        "models": values,
        "differences": differences,
    }


def _number(value: Any) -> float | None:
    """Return a number that JSON can hold; lm-eval writes N/A where it has none."""
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _of_rows(result: Mapping[str, Any], task: str, key: str) -> np.ndarray | None:
    """Return a metric of every row, where the metric is their mean."""
    name, _, chosen = key.partition(",")
    samples = result["samples"].get(task, ())
    values = [sample.get(name) for sample in samples if sample["filter"] == chosen]
    if not values or not all(isinstance(value, bool | int | float) for value in values):
        return None
    rows = np.array(values, dtype=np.float64)
    return rows if math.isclose(rows.mean(), result["results"][task][key], rel_tol=1e-9, abs_tol=1e-12) else None
