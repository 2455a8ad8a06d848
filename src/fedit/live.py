"""What a run shows while it works: one live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections import deque
from types import TracebackType
from typing import Self

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from fedit.experiment import Event, PhaseStarted, Progressed, RoundFinished
from fedit.report.format import size

SHOWN_ROUNDS = 8
TITLES = {
    "federated": "Federated tuning",
    "sites": "Rounds across the sites",
    "local": "Local-only tuning",
    "central": "Centralised tuning",
    "evaluation": "Evaluation",
}
UNITS = {"evaluation": "models", "sites": "rounds"}
"""What a phase counts; the others count tokens."""


class LiveView:
    """Shows the events of a run; use it as a context manager and pass it as `notify`."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._rounds: deque[RoundFinished] = deque(maxlen=SHOWN_ROUNDS)
        self._live = Live(console=console, get_renderable=self._render, refresh_per_second=4)
        self._phase: tuple[str, float, int] | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def __call__(self, event: Event) -> None:
        match event:
            case PhaseStarted():
                self._start(event)
            case Progressed():
                self._advance(event.amount)
            case RoundFinished():
                self._rounds.append(event)
                if not self._console.is_terminal:
                    self._console.print(_round_line(event), markup=False, highlight=False, soft_wrap=True)

    def _start(self, event: PhaseStarted) -> None:
        for task in self._progress.tasks:
            self._progress.update(task.id, total=task.completed)
        title = TITLES[event.phase]
        self._phase = (event.phase, time.perf_counter(), 0)
        self._progress.add_task(title, total=event.total, rate="")
        if not self._console.is_terminal:
            unit = UNITS.get(event.phase, "tokens")
            self._console.print(f"{title}: {event.total:,} {unit}", highlight=False, soft_wrap=True)

    def _advance(self, amount: int) -> None:
        assert self._phase is not None
        name, started, done = self._phase
        self._phase = (name, started, done + amount)
        rate = (done + amount) / max(1e-9, time.perf_counter() - started)
        shown = f"{done + amount} {UNITS[name]}" if name in UNITS else f"{rate:,.0f} tokens/s"
        self._progress.update(self._progress.tasks[-1].id, advance=amount, rate=shown)

    def _render(self) -> Group:
        table = Table(box=None, pad_edge=False)
        headers = ("Round", "Clients", "Train loss", "Held-out loss", "Tokens/s", "Up", "Down")
        for header in headers:
            table.add_column(header, justify="right")
        for event in self._rounds:
            table.add_row(*_round_cells(event))
        return Group(table, self._progress) if self._rounds else Group(self._progress)


def _round_cells(event: RoundFinished) -> list[str]:
    record = event.record
    answered = len(record.cohort) - len(record.failures)
    return [
        f"{record.round}/{event.num_rounds}",
        f"{answered}/{len(record.cohort)}" if record.cohort or record.epsilon is None else "withheld",
        "" if record.train_loss is None else f"{record.train_loss:.3f}",
        "" if record.test_loss is None else f"{record.test_loss:.3f}",
        f"{record.tokens / max(1e-9, event.seconds):,.0f}",
        size(record.bytes_up),
        size(record.bytes_down),
    ]


def _round_line(event: RoundFinished) -> str:
    number, clients, train_loss, test_loss, rate, up, down = _round_cells(event)
    held_out = f", held-out loss {test_loss}" if test_loss else ""
    failed = "".join(f"; {client} failed: {reason}" for client, reason in event.record.failures.items())
    losses = f"train loss {train_loss or 'none'}{held_out}"
    spent = "" if event.record.epsilon is None else f", epsilon {event.record.epsilon:.2f}"
    return f"round {number}: {clients} clients, {losses}{spent}, {rate} tokens/s, up {up}, down {down}{failed}"
