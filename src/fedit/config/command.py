"""A configuration -> the command that runs it, whatever way it was given the first time."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from fedit.config.loading import apply_overrides, parse_config, read_recipe, read_value
from fedit.config.run import RunConfig
from fedit.interfaces import ConfigError

_ABSENT = object()


def run_command(config: RunConfig, recipe: str = "", plugin_files: Sequence[Path] = ()) -> str | None:
    """Return the ``fedit run`` that runs `config`: its recipe (the default one, where there is none or it is gone), and
    overrides of what differs from it, no more. None: no command line can say it.

    The plug-ins of `plugin_files` are loaded already.
    """
    for name in dict.fromkeys((recipe or "default", "default")):
        try:
            overrides = _overrides(read_recipe(name), config.to_json())
        except ConfigError:  # the recipe is gone, or no longer one
            continue
        if overrides is not None:
            changes = [part for override in overrides for part in ("-o", override)]
            files = [part for file in plugin_files for part in ("--plugin", str(file))]
            return shlex.join(["fedit", "run", name, *changes, "--seed", str(config.seed), *files])
    return None


def _overrides(tables: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str] | None:
    """Return the fewest overrides, beside the seed's, that make a recipe's tables the wanted configuration."""
    seeded = {**tables, "seed": wanted["seed"]}

    def gives(overrides: Sequence[str]) -> bool:
        try:
            return parse_config(apply_overrides(seeded, overrides)).to_json() == wanted
        except ConfigError:
            return False

    given = parse_config(seeded).to_json()
    overrides = [f"{key}={override_value(value)}" for key, value in _changes(given, wanted)]
    if not gives(overrides):
        return None
    for override in list(overrides):
        fewer = [each for each in overrides if each != override]
        if gives(fewer):
            overrides = fewer
    return overrides


def _changes(given: Any, wanted: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the keys that have to be set so that `given` becomes `wanted`, with their values.

    Of another plug-in all parameters are yielded: its name empties the table.
    """
    if given == wanted:
        return
    tables = isinstance(wanted, Mapping) and isinstance(given, Mapping | None)
    if not tables or not wanted or not all(re.fullmatch(r"\w+", name) for name in wanted):
        yield key, wanted
        return
    old = {} if given is None or given.get("name") != wanted.get("name") else given
    if not old.keys() <= wanted.keys():
        yield key, wanted
        return
    for name, value in wanted.items():
        yield from _changes(old.get(name, _ABSENT), value, f"{key}.{name}".lstrip("."))


def override_value(value: Any) -> str:
    """Return a value as ``-o key=`` takes it: TOML in one line, text without quotes where nothing else can be meant."""
    if isinstance(value, str) and value == value.strip() and read_value(value) == value:
        return value
    return "none" if value is None else toml(value)


def toml(value: Any) -> str:
    """Return a value as TOML writes it in one line; None is ``"none"``."""
    if isinstance(value, Mapping) and value:
        return "{ " + ", ".join(f"{json.dumps(key)} = {toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    return json.dumps("none" if value is None else value, ensure_ascii=False)
