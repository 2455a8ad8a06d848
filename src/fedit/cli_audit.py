"""The command that attacks a finished run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from fedit.config import load_plugins, recorded_config
from fedit.console import AsJson, console, described_run, print_json, quiet, say

audit_app = App(name="audit")
BROKEN = 3
"""Exit status of a broken promise: an error's is 1."""


@audit_app.default
def audit(
    folder: Path,
    /,
    *,
    rounds: Annotated[int, Parameter(help="Of the runs that are made again with canaries, at most")] = 8,
    as_json: AsJson = False,
) -> None:
    """Attack a finished run: what do its updates, their sum and its final model tell, with and without noise?

    FOLDER is what `fedit run` wrote. The exit status is 3 where more leaks than the accountant allows.
    """
    described = described_run(folder)
    load_plugins([Path(file) for file in described.get("plugin_files", [])])
    config = recorded_config(described, folder)
    quiet()
    from fedit.audit.folder import audit_run
    from fedit.report.leaks import leaks_table

    with console.status("") as status:
        found = audit_run(folder, config, rounds, status.update)
    console.print(leaks_table(found))
    for reason in found["violations"]:
        console.print("[bold red]A promise is broken[/bold red]", end=" ")
        say(reason)
    say(f"Report: {folder / 'report.html'}")
    if as_json:
        print_json(found)
    if found["violations"]:
        sys.exit(BROKEN)
