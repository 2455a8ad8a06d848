"""What the commands share: where they print, the options they have in common."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter
from rich.console import Console

from fedit.config import RunConfig, load_config, load_plugins, recorded_config
from fedit.interfaces import ConfigError

console = Console(stderr=True)
"""What people read goes to stderr; stdout carries results alone."""

Overrides = Annotated[
    list[str] | None,
    Parameter(name=["--override", "-o"], negative="", help="Set a key of the recipe: -o client.learning_rate=1e-3"),
]
PluginFiles = Annotated[
    list[Path] | None, Parameter(name="--plugin", negative="", help="A Python file that defines plug-ins")
]
Seed = Annotated[int | None, Parameter(help="The run's seed, instead of the recipe's")]
Track = Annotated[
    list[str] | None,
    Parameter(name="--track", negative="", help="Mirror the run's numbers to tensorboard, mlflow or wandb"),
]
AsJson = Annotated[bool, Parameter(name="--json", negative="", help="Print the result on stdout as JSON")]


def say(text: str) -> None:
    """Print text as it is: no markup is read in it, and no line of it is broken, so that commands can be copied."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def quiet() -> None:
    """Keep transformers' own progress bars and advice out of ours."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers.utils import logging as transformers_logging

    logging.getLogger("huggingface_hub").propagate = False  # it has a handler of its own
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()


def print_json(value: Any) -> None:
    """Print a result on stdout."""
    print(json.dumps(value, indent=2, ensure_ascii=False, default=str))


def load(recipe: str, override: list[str] | None, plugin: list[Path] | None, seed: int | None) -> RunConfig:
    """Return the configuration of a recipe, with overrides and plug-ins."""
    overrides = [*(override or []), *([] if seed is None else [f"seed={seed}"])]
    return load_config(recipe, overrides, plugin or ())


def resumed(
    folder: Path,
    recipe: str | None,
    override: list[str] | None,
    plugin: list[Path] | None,
    out: Path | None,
    seed: int | None,
) -> tuple[RunConfig, str, list[Path] | None]:
    """Return what `folder` was started with; nothing but the rest of the run may be asked for."""
    if recipe is not None or override or out is not None or seed is not None:
        raise ConfigError(
            "--resume goes on with the run as it was configured: leave out the recipe, -o, --out and --seed."
        )
    described = described_run(folder)
    plugin = plugin or [Path(file) for file in described.get("plugin_files", [])]
    load_plugins(plugin)
    return recorded_config(described, folder), described["recipe"], plugin


def described_run(folder: Path) -> dict[str, Any]:
    """Return the content of a run's config.json."""
    from fedit.report import RunFolder

    return dict(RunFolder.read(folder).config)
