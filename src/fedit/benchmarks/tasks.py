"""Tasks of lm-eval by name: its own, those shipped here, and YAML files of the user; their data from a local file."""

from __future__ import annotations

import difflib
import functools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import yaml
from lm_eval.tasks import TaskManager

from fedit.interfaces import ConfigError, DataError, FeditError

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks.manager import TaskDict

SHIPPED = Path(__file__).parent / "shipped"
_READERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""By the ending of a file, what `datasets` calls its reader"""
OWN_ROWS = "instructions"
"""The shipped task without data"""
_NEEDS_PUNKT = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}
"""IFEval's instructions whose check needs NLTK's data"""


def load_tasks(
    names: Sequence[str], include: Sequence[Path] = (), data: Mapping[str, Path] | None = None, seed: int = 0
) -> TaskDict:
    """Return the tasks and groups that `names` (a name, a pattern as ``mmlu_*``, or a YAML file) stand for.

    `include` are folders of YAML tasks beside lm-eval's own. `data` puts a file or folder in the place of a task's
    data. `seed` is the run's, which decides the rows of task ``pasture``.

    Raises:
        ConfigError: there is no such task, it needs more than text, or it runs what the model writes.
        DataError: a task's data cannot be had.
    """
    data = data or {}
    for folder in include:
        if not folder.is_dir():
            raise ConfigError(f"--include-path {folder} is no folder. Give the folder of your YAML tasks.")
    manager = _manager(tuple(include), seed, False)
    # lm-eval's own index is 14,000 files, read in seconds: only where it is needed.
    if not all(name in manager.all_subtasks or _is_file(name) for name in names):
        manager = _manager(tuple(include), seed, True)
    found = list(dict.fromkeys(name for wanted in names for name in _resolve(wanted, manager, include)))
    if strangers := data.keys() - set(found):
        raise ConfigError(f"--data {min(strangers)}: not among the tasks: {', '.join(found)}.")
    if OWN_ROWS in found and OWN_ROWS not in data:
        raise ConfigError(
            f"Task {OWN_ROWS} asks rows of your own: --data {OWN_ROWS}=FILE (JSON, JSONL, CSV or Parquet with "
            "instruction, response and, if any, context)."
        )
    with tempfile.TemporaryDirectory() as place:
        try:
            tasks = manager.load(
                [str(_with_data(name, manager, data[name], Path(place))) if name in data else name for name in found]
            )
        except FeditError:
            raise
        except Exception as error:
            raise DataError(
                f"{', '.join(found)} cannot be loaded: {type(error).__name__}: {error}\nData of a task that cannot be "
                "had here may come from a file: --data TASK=FILE (JSON, JSONL, CSV or Parquet), or from a folder that "
                "`datasets` reads."
            ) from error
    for name, task in tasks["tasks"].items():
        _check(name, task)
    return tasks


@functools.cache
def _manager(include: tuple[Path, ...], seed: int, everything: bool) -> TaskManager:
    return TaskManager(include_path=[SHIPPED, *include], include_defaults=everything, metadata={"run_seed": str(seed)})


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


def _resolve(wanted: str, manager: TaskManager, include: Sequence[Path]) -> list[str]:
    if _is_file(wanted):
        if not Path(wanted).is_file():
            raise ConfigError(f"--tasks {wanted}: there is no such file.")
        return [wanted]
    if names := manager.match_tasks([wanted]):
        return names
    near = difflib.get_close_matches(wanted, manager.all_tasks, n=1)
    hint = f"Did you mean {near[0]!r}?" if near else "`lm-eval ls tasks` lists lm-eval's own."
    read = {entry.yaml_path for entry in manager.task_index.values()}
    left = [str(file) for folder in include for file in sorted(folder.rglob("*.yaml")) if file not in read]
    also = f" These files of --include-path could not be read as tasks: {', '.join(left)}." if left else ""
    raise ConfigError(f"--tasks {wanted}: there is no such task. {hint}{also}")


def _with_data(name: str, manager: TaskManager, path: Path, place: Path) -> Path:
    """Write a task that differs from `name` in where its data come from, and return its file."""
    entry = manager.task_index.get(name)
    file = Path(name) if entry is None else entry.yaml_path
    if not path.exists():
        raise ConfigError(f"--data {name}={path}: there is no such file.")
    if file is None or not (split := _evaluated_split(file)):
        raise ConfigError(f"--data {name}: the task takes no data; a group's tasks take theirs one by one.")
    # A function of the task that makes its rows would come before any file.
    changed: dict[str, Any] = {"include": str(file.resolve()), "custom_dataset": None}
    if path.is_dir():
        # A copy of the Hub's data set has its parts by name, as its README says.
        has_parts = (path / "README.md").is_file()
        changed |= {"dataset_path": str(path.resolve()), "dataset_kwargs": {}}
        changed |= {} if has_parts else {"dataset_name": None}
    elif path.suffix in _READERS:
        files = {split: str(path.resolve())}
        changed |= {
            "dataset_path": _READERS[path.suffix],
            "dataset_name": None,
            "dataset_kwargs": {"data_files": files},
        }
    else:
        raise ConfigError(f"--data {name}={path}: expected a folder, or a file that ends in {', '.join(_READERS)}.")
    written = place / f"{len(list(place.iterdir()))}.yaml"
    written.write_text(yaml.safe_dump(changed), encoding="utf-8")
    return written


def _evaluated_split(file: Path) -> str | None:
    """Return the split that a task in YAML is evaluated on."""
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(file, resolve_func=False)
    return config.get("test_split") or config.get("validation_split")


def _check(name: str, task: Task) -> None:
    if getattr(task, "UNSAFE_CODE", False):
        raise ConfigError(f"Task {name} runs code that the model writes, which fedit does not. Leave it out.")
    if getattr(task, "MULTIMODAL", False):
        raise ConfigError(f"Task {name} asks about pictures or sound; models of fedit read text. Leave it out.")
    rows = task.eval_docs
    if "instruction_id_list" in getattr(rows, "features", ()) and "nltk" in sys.modules:
        asked = {each for row in cast("Any", rows) for each in row["instruction_id_list"]} & _NEEDS_PUNKT
        if asked and not _has_punkt():
            raise DataError(
                f"Task {name} checks {min(asked)} with NLTK's data punkt_tab, which could not be downloaded. Where "
                "there is a network: python -m nltk.downloader punkt_tab; then copy the folder nltk_data to your home "
                "here, or name it in NLTK_DATA."
            )


def _has_punkt() -> bool:
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        return False
    return True
