"""The pace of requests, by a clock of the test's own."""

from __future__ import annotations

import asyncio

import pytest

from fedit.judge import client


def test_requests_keep_their_distance_and_wait_while_held(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0

    async def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(client.time, "monotonic", lambda: now)
    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    pace, times = client.Pace(120), []

    async def go() -> None:
        nonlocal now
        for _ in range(3):
            await pace.turn()
            times.append(now)
        pace.hold(7)
        await pace.turn()
        times.append(now)
        now += 60  # idle time is not saved up
        for _ in range(2):
            await pace.turn()
            times.append(now)

    asyncio.run(go())
    assert times == pytest.approx([100, 100.5, 101, 108, 168, 168.5])


def test_without_a_limit_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    waits = []

    async def sleep(seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(client.time, "monotonic", lambda: 5.0)
    monkeypatch.setattr(client.asyncio, "sleep", sleep)
    pace = client.Pace(None)

    async def go() -> None:
        for _ in range(3):
            await pace.turn()

    asyncio.run(go())
    assert waits == [0, 0, 0]
