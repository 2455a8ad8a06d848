"""Runs of the command line in processes of their own, killed at a chosen moment.

The imports take seconds and a tiny run less than one, so one process imports everything and is forked for each run:
``python forked_runs.py`` reads jobs, one JSON object per line, and answers each with its exit status.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# ------------------------------------------------------------------------------------------------ in the test process


@dataclass(frozen=True)
class Finished:
    """How a run ended: its exit status (negative: the signal that killed it) and what it wrote to both outputs."""

    status: int
    output: str


class ForkedRuns:
    """Starts runs; use it as a context manager."""

    def __init__(self, folder: Path) -> None:
        self._output = folder / "output.txt"
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def __enter__(self) -> ForkedRuns:
        return self

    def __exit__(self, *error: object) -> None:
        self._process.communicate(timeout=300)

    def __call__(self, *arguments: str | Path, kill: str = "") -> Finished:
        """Run ``fedit <arguments>``; `kill` names the moment (`KILLS`) at which it kills itself."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        job = {"arguments": [str(argument) for argument in arguments], "kill": kill, "output": str(self._output)}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        status = int(self._process.stdout.readline())
        return Finished(status, self._output.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------------- in the processes


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _at_progress(phase: str, number: int) -> Callable[[], None]:
    """Die at the `number`-th progress report of a phase; at its start where that is 0."""

    def install() -> None:
        from fedit.experiment import PhaseStarted, Progressed
        from fedit.live import LiveView

        shown, reports = LiveView.__call__, []

        def call(self: LiveView, event: Any) -> None:
            if isinstance(event, PhaseStarted):
                reports[:] = [event.phase]
            elif isinstance(event, Progressed):
                reports.append("report")
            if reports[:1] == [phase] and len(reports) == number + 1:
                _die()
            shown(self, event)

        LiveView.__call__ = call

    return install


def _before(function: str, applies: Callable[..., bool], *, half: bool = False) -> Callable[[], None]:
    """Die in place of the first call of an `experiment` function that `applies`; `half`: with half a line written."""

    def install() -> None:
        from fedit import experiment

        called = getattr(experiment, function)

        def call(*arguments: Any) -> Any:
            if applies(*arguments):
                if half:
                    arguments[0].open("ab").write(json.dumps(arguments[1]).encode()[:20])
                _die()
            return called(*arguments)

        setattr(experiment, function, call)

    return install


def _before_rename(name: str) -> Callable[[], None]:
    """Die when a file is written and synced, but has its temporary name still."""

    def install() -> None:
        renamed = Path.replace

        def call(self: Path, target: Path) -> Path:
            if target.name == name:
                _die()
            return renamed(self, target)

        Path.replace = call  # type: ignore[method-assign]

    return install


KILLS: dict[str, Callable[[], None]] = {
    "config.json has its temporary name": _before_rename("config.json"),
    "before partition.json": _before("write_json", lambda path, value: path.name == "partition.json"),
    "in the first step": _at_progress("federated", 1),
    "in the second round": _at_progress("federated", 6),
    "with half a line of the third round": _before(
        "append_line", lambda path, value: value.get("round") == 3 and "cohort" in value, half=True
    ),
    "between line and checkpoint": _before("save_state", lambda state, folder: state.round_index == 3),
    "when a checkpoint has its temporary name": _before_rename("round-00003.safetensors"),
    "with half a line of timings": _before(
        "append_line", lambda path, value: value.get("round") == 2 and "seconds" in value, half=True
    ),
    "before the adapter": _before("save_adapter", lambda *arguments: True),
    "between the files of the adapter": _before_rename("adapter_model.safetensors"),
    "in the first group of local models": _at_progress("local", 2),
    "in the second group of local models": _at_progress("local", 10),
    "in centralised tuning": _at_progress("central", 3),
    "when evaluation starts": _at_progress("evaluation", 0),
    "when answers are there": _at_progress("evaluation", 1),
    "between answers and evaluation": _before("write_json", lambda path, value: path.name == "evaluation.json"),
    "before the report": _before("write_report", lambda folder: True),
}


def _run(job: dict[str, Any]) -> None:
    from fedit import baselines, cli

    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    baselines.SAVE_EVERY_S = 0
    if job["kill"]:
        KILLS[job["kill"]]()
    cli.main(job["arguments"])


def _serve() -> None:
    # Everything a run imports, and nothing that starts threads: a fork copies one thread only.
    for module in ("transformers.models.llama.modeling_llama", "fedit.cli", "fedit.experiment", "fedit.live"):
        importlib.import_module(module)
    from fedit.config import load_plugins

    load_plugins()
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            status = 1
            try:
                _run(json.loads(line))
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
            except BaseException:  # noqa: BLE001 (whatever it is, it must not go on in the parent's loop)
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        _, status = os.waitpid(process, 0)
        sys.stdout.write(f"{os.waitstatus_to_exitcode(status)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    _serve()
