"""Keeps the processes of a server or a site running: what ends is started again, with growing pauses."""

from __future__ import annotations

import ctypes
import logging
import os
import signal
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

log = logging.getLogger(__name__)

PAUSE_S = 1.0, 30.0
"""First and longest pause before a process is started again."""
LIVED_S = 5.0
"""A process that lived so long had started well: the pauses begin anew."""
GRACE_S = 10.0
"""Between SIGTERM and SIGKILL."""
LIBC = ctypes.CDLL(None)
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Program:
    """A process that should always run; what it prints goes to ``logs/NAME.log``."""

    name: str
    command: Sequence[str]
    folder: Path
    """Its working directory"""
    environment: Mapping[str, str] = field(default_factory=dict)


class _Running:
    """A program and its process."""

    def __init__(self, program: Program, logs: Path) -> None:
        self._program = program
        self._log = logs / f"{program.name}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._started = 0.0
        self._pause = PAUSE_S[0]
        self._start_at = 0.0

    def check(self) -> None:
        """Start the process if it is due, and notice where it has ended."""
        now = time.monotonic()
        if self._process is None:
            if now >= self._start_at:
                self._start(now)
            return
        if self._process.poll() is None:
            return
        self.end()
        if now - self._started > LIVED_S:
            self._pause = PAUSE_S[0]
        status = self._process.returncode
        log.warning("%s ended with status %d; it starts again in %.0f s", self._program.name, status, self._pause)
        self._process, self._start_at = None, now + self._pause
        self._pause = min(PAUSE_S[1], 2 * self._pause)

    def end(self) -> None:
        """End the process and all that it started."""
        if self._process is None:
            return
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(GRACE_S)

    def _start(self, now: float) -> None:
        with self._log.open("ab") as output:
            self._process = subprocess.Popen(
                self._program.command,
                cwd=self._program.folder,
                env={**os.environ, **self._program.environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that all that it starts can be ended with it
                preexec_fn=_end_with_supervisor,  # noqa: PLW1509 (one call, and no thread of ours runs here)
            )
        self._started = now
        log.info("%s runs as process %d", self._program.name, self._process.pid)


def supervise(programs: Sequence[Program], logs: Path, stopped: threading.Event) -> None:
    """Run `programs` until `stopped`, then end them and all that they started."""
    logs.mkdir(parents=True, exist_ok=True)
    running = [_Running(program, logs) for program in programs]
    try:
        while not stopped.wait(0.2):
            for program in running:
                program.check()
    finally:
        for program in running:
            program.end()


def _end_with_supervisor() -> None:
    """Let the kernel end this process when its supervisor is killed (Linux only)."""
    with suppress(AttributeError):
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
