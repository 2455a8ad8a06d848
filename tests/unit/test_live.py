"""What a run shows while it works."""

from __future__ import annotations

import re
from dataclasses import replace
from io import StringIO

from rich.console import Console

from fedit.experiment import PhaseStarted, Progressed, RoundFinished
from fedit.live import SHOWN_ROUNDS, LiveView
from fedit.server import RoundRecord

RECORD = RoundRecord(
    round=1,
    cohort=["a", "b"],
    failures={"b": "loss is not finite at step 3; lower [client] learning_rate"},
    train_loss=1.23456,
    update_norm=0.5,
    aggregation_loss=0.01,
    bytes_up=1_500_000,
    bytes_down=3_000_000,
    tokens=1000,
    test_loss=2.5,
)


def shown(terminal: bool, width: int = 100) -> str:
    """Return what is written of a run of twelve rounds and its evaluation."""
    buffer = StringIO()
    console = Console(file=buffer, force_terminal=terminal, width=width, color_system=None)
    with LiveView(console) as view:
        view(PhaseStarted("federated", 12_000))
        for number in range(1, 13):
            view(Progressed(1000))
            view(RoundFinished(replace(RECORD, round=number), seconds=0.5, num_rounds=12))
        view(PhaseStarted("evaluation", 5))
        view(Progressed(5))
    return buffer.getvalue()


def test_plain_lines_without_a_terminal() -> None:
    """Whatever the width: one line for a round, that a script can cut, with the failures as they were written."""
    lines = shown(terminal=False, width=30).splitlines()
    failed = "b failed: loss is not finite at step 3; lower [client] learning_rate"
    assert lines[0] == "Federated tuning: 12,000 tokens"
    assert lines[1] == (
        "round 1/12: 1/2 clients, train loss 1.235, held-out loss 2.500, 2,000 tokens/s, up 1.50 MB, down 3.00 MB; "
        + failed
    )
    assert len(lines) == 14
    assert lines[-1] == "Evaluation: 5 models"


def test_a_table_of_the_last_rounds_on_a_terminal() -> None:
    last = shown(terminal=True).rpartition("Round")[2]
    assert [int(number) for number in re.findall(r"(\d+)/12", last)] == list(range(13 - SHOWN_ROUNDS, 13))
    assert "Federated tuning" in last
    assert "5 models" in last
    assert "1.50 MB" in last
