"""What the reader of a page has, as small as it can be: a model, rows, files of questions, and what fedit ships."""

from __future__ import annotations

import json
import shutil
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fedit.config import apply_overrides, shipped_recipes, shipped_studies

MODELS = ("path/to/model", "my-base")
ROWS = ("path/to/rows.jsonl", "path/to/rows/rows.jsonl", "rows.jsonl")
RECIPES = ("my-recipe.toml", "recipe.toml")
QUESTIONS = ("question.jsonl", "vicuna.jsonl")
ANSWERS = ("answer_vicuna-13b.jsonl", "mine.jsonl", "theirs.jsonl")
IFEVAL = ("input_data.jsonl",)
"""The names by which pages call these"""
TINY = (
    "rounds=2",
    "model.dtype=float32",
    "data.test_per_category=2",
    "data.max_length=256",
    "client.batch_size=2",
    "partition.num_clients=10",
    "evaluation.every=1",
    "evaluation.max_new_tokens=2",
    "engine.device=cpu",
)


def make_reader(folder: Path, model: Path) -> None:
    """Write the reader's files into ``reader``, and the tiny forms of shipped recipes and studies beside it."""
    reader = folder / "reader"
    for name in MODELS:
        shutil.copytree(model, reader / name)
    rows = [
        {"instruction": f"{word} {number}?", "response": word[::-1], "category": word, "client": f"client {number % 4}"}
        for word in ("ab", "cde", "fg", "hi")
        for number in range(12)
    ]
    questions = [{"question_id": number, "text": f"What is {number}?", "category": "generic"} for number in range(3)]
    answers = [{"question_id": number, "text": f"It is {number}."} for number in range(3)]
    asked = {"prompt": "Say it.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}
    for names, lines in ((ROWS, rows), (QUESTIONS, questions), (ANSWERS, answers), (IFEVAL, [{"key": 0, **asked}])):
        for name in names:
            write_lines(reader / name, lines)
    for kind, make, shipped in (("recipes", _recipe, shipped_recipes()), ("studies", _study, shipped_studies())):
        (folder / kind).mkdir()
        for name, path in shipped.items():
            tables = make(tomllib.loads(path.read_text(encoding="utf-8")), reader)
            (folder / kind / f"{name}.toml").write_text(_toml(tables), encoding="utf-8")
    for name in RECIPES:
        shutil.copy(folder / "recipes" / "default.toml", reader / name)


def write_lines(path: Path, lines: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")


def _recipe(tables: dict[str, Any], reader: Path) -> dict[str, Any]:
    """Return a shipped recipe as it is, but for the model, the rows and how long it takes."""
    steps = ["client.local_steps=1"] if "local_steps" in tables["client"] else []
    paths = [f"model.path={reader / MODELS[0]}", f"data.path={reader / ROWS[0]}"]
    return apply_overrides(tables, [*paths, *TINY, *steps])


def _study(tables: dict[str, Any], reader: Path) -> dict[str, Any]:
    """Return a shipped study with one seed and two choices of each axis, the reference one of them."""
    for axis, choices in tables["axes"].items():
        kept = list(dict.fromkeys([tables.get("reference", {}).get(axis, next(iter(choices))), *choices]))[:2]
        tables["axes"][axis] = {name: choices[name] for name in kept}
    return tables | {"seeds": [0], "override": tables.get("override", {}) | {"rounds": 1}}


def _toml(tables: Mapping[str, Any]) -> str:
    """Return tables as a TOML file."""

    def inline(value: Any) -> str:
        if isinstance(value, Mapping):
            return "{ " + ", ".join(f"{json.dumps(key)} = {inline(item)}" for key, item in value.items()) + " }"
        return json.dumps(value)

    return "".join(f"{json.dumps(key)} = {inline(value)}\n" for key, value in tables.items())
