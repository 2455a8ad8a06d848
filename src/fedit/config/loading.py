"""TOML and overrides -> a checked `RunConfig`; plug-ins from entry points and files."""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.resources
import importlib.util
import sys
import tomllib
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from fedit.config.explaining import explain
from fedit.config.run import RunConfig
from fedit.interfaces import ConfigError, FeditError, did_you_mean


def load_plugins(files: Sequence[Path] = ()) -> None:
    """Import every module of the entry-point group ``fedit.plugins`` (fedit's own among them) and `files`.

    A file that is itself the running script has defined its plug-ins already.

    Raises:
        ConfigError: a file is missing, a module does not import, or a plug-in takes another's name.
    """
    for entry_point in importlib.metadata.entry_points(group="fedit.plugins"):
        _import(f"The plug-in module {entry_point.value}", entry_point.load)
    for file in files:
        path = file.resolve()
        if path == _script():
            continue
        module_name = f"fedit_plugin_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
        if module_name in sys.modules:
            continue
        spec = importlib.util.spec_from_file_location(module_name, path)
        if not path.is_file() or spec is None or spec.loader is None:
            raise ConfigError(f"--plugin {file}: no such Python file.")
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            _import(f"--plugin {file}", partial(spec.loader.exec_module, module))
        except ConfigError:
            del sys.modules[module_name]
            raise


def _script() -> Path | None:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return None if file is None else Path(file).resolve()


def _import(what: str, execute: Callable[[], object]) -> None:
    try:
        execute()
    except FeditError as error:
        raise ConfigError(f"{what}: {error}") from error
    except Exception as error:  # this code is not ours, so it may raise anything
        raise ConfigError(f"{what} does not import: {type(error).__name__}: {error}") from error


def shipped_recipes() -> dict[str, Path]:
    """Return the recipes that come with fedit, by name."""
    return _shipped("recipes")


def shipped_studies() -> dict[str, Path]:
    """Return the studies that come with fedit, by name."""
    return _shipped("studies")


def _shipped(kind: str) -> dict[str, Path]:
    folder = Path(str(importlib.resources.files("fedit") / kind))
    return {path.stem: path for path in sorted(folder.glob("*.toml"))}


def load_config(recipe: str, overrides: Sequence[str] = (), plugin_files: Sequence[Path] = ()) -> RunConfig:
    """Read a recipe (a TOML file, or the name of a shipped one), apply ``key.sub=value`` overrides and check it.

    Raises:
        ConfigError: naming each wrong key with what was got and expected.
    """
    load_plugins(plugin_files)
    return parse_config(apply_overrides(read_recipe(recipe), overrides))


def read_recipe(recipe: str) -> dict[str, Any]:
    """Return the tables of a recipe: a TOML file, or the name of a shipped one.

    Raises:
        ConfigError: there is none, or it is not TOML.
    """
    path = Path(recipe) if recipe.endswith(".toml") else shipped_recipes().get(recipe)
    if path is None:
        raise ConfigError(f"No shipped recipe is named {recipe!r}. {did_you_mean(recipe, shipped_recipes())}")
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"Recipe {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"Recipe {path} is not valid TOML: {error}.") from error


def parse_config(tables: Mapping[str, Any]) -> RunConfig:
    """Return the checked configuration of TOML (or `RunConfig.to_json`) tables."""
    try:
        config = RunConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError(explain(error, RunConfig)) from error
    config.check()
    return config


def recorded_config(described: Mapping[str, Any], folder: Path) -> RunConfig:
    """Return the configuration of a run, of the content of its ``config.json``, once its plug-ins are loaded.

    Raises:
        ConfigError: another version of fedit wrote it, whose keys or values are none of this one.
    """
    try:
        return parse_config(described["config"])
    except ConfigError as error:
        version = described.get("versions", {}).get("fedit", "of another version")
        error.add_note(f"{folder} was written by fedit {version}: read it with that version, or run it again.")
        raise


def apply_overrides(tables: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Return `tables` with each ``key.sub=value`` set; the value is read as TOML, or as text where it is none.

    Choosing another plug-in (``partition.name=dirichlet``) drops the parameters that the table gave to the former.
    """
    result: dict[str, Any] = {
        key: dict(value) if isinstance(value, Mapping) else value for key, value in tables.items()
    }
    # A whole table, or the name that empties it, comes before its parameters, in whatever order they are given.
    outer_first = sorted(overrides, key=lambda item: item.partition("=")[0].strip().removesuffix(".name").count("."))
    for item in outer_first:
        key, equals, text = item.partition("=")
        parts = key.strip().split(".")
        if not equals or not all(parts):
            raise ConfigError(f"-o {item}: expected key.sub=value, e.g. -o client.learning_rate=1e-3.")
        table = result
        for part in parts[:-1]:
            inner = table.get(part)
            table[part] = dict(inner) if isinstance(inner, Mapping) else {} if inner is None else {"name": inner}
            table = table[part]
        value = read_value(text.strip())
        if parts[-1] == "name" and table.get("name", value) != value:
            table.clear()
        table[parts[-1]] = value
    return result


def read_value(text: str) -> Any:
    """Return the value of an override: TOML, or the text itself where it is none."""
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text
