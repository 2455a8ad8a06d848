"""The experiment from Python: what `fedit run` composes, as one function."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fedit.config import RunConfig, load_config
from fedit.experiment import Notify, check_folder, run_experiment
from fedit.files import new_folder
from fedit.interfaces import ConfigError
from fedit.prepare import prepare_data
from fedit.report import RunFolder


def run(
    config: RunConfig | str | Path = "default",
    overrides: Sequence[str] = (),
    *,
    folder: Path | str | None = None,
    resume: bool = False,
    plugin_files: Sequence[Path | str] = (),
    notify: Notify = lambda event: None,
) -> RunFolder:
    """Run an experiment as `fedit run` does, and return its folder, read.

    Args:
        config: a recipe (a TOML file, or the name of a shipped one), or a configuration that is loaded already.
        overrides: keys of the recipe to change, as after ``-o``: ``["rounds=5", "partition.name=iid"]``.
        folder: where the run goes; by default a new one, ``runs/<recipe>``.
        resume: go on where the same call was interrupted, if it was; a finished run is returned as it is.
        plugin_files: Python files that define plug-ins. A plug-in defined where `run` is called is known without; its
            file is named all the same so that the commands can read the run.
        notify: is called with every event: `PhaseStarted`, `Progressed`, `RoundFinished`.

    Raises:
        ConfigError: the configuration cannot work, or the folder holds another run.
        DataError, EngineError: rows or base cannot be used.
        RoundError: a round could not be completed; with `resume`, the same call goes on from the round before.
    """
    if resume and folder is None:
        raise ConfigError("resume=True goes on in a folder: name it, folder=...")
    files = [Path(file) for file in plugin_files]
    if isinstance(config, RunConfig):
        if overrides:
            raise ConfigError("Overrides change a recipe: give them to load_config, which made this configuration.")
        recipe, checked = "", config
    else:
        recipe = str(config)
        checked = load_config(recipe, overrides, files)
    place = new_folder(Path(recipe).stem or "run") if folder is None else Path(folder)
    check_folder(place, checked, resume=resume and (place / "config.json").is_file())
    return run_experiment(checked, place, prepare_data(checked), notify, recipe=recipe, plugin_files=files)
