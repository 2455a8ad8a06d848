"""The command that mirrors a run afterwards."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fedit.console import say
from fedit.interfaces import EngineError

track_app = App(name="track")


@track_app.default
def track(
    folder: Path, trackers: Annotated[list[str], Parameter(help="tensorboard, mlflow, wandb", negative="")], /
) -> None:
    """Mirror the numbers of a run to trackers, as far as it has come: those that lack something, or new ones.

    FOLDER is what `fedit run` wrote. `fedit run --track` does it while the run goes on.
    """
    from fedit.report import RunFolder
    from fedit.tracking import Mirror, check_trackers

    RunFolder.read(folder)
    check_trackers(trackers)
    with Mirror(folder, trackers) as mirror:
        mirror.catch_up()
    if mirror.problems:
        raise EngineError("\n".join(f"{name}: {reason}" for name, reason in mirror.problems.items()))
    say("\n".join(mirror.summary()))
