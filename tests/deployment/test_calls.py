"""What the rounds may expect of the calls that an engine carries: those of `tests/conformance` through real ones."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from federations import SITES, Deployment, Finished, federate, load, simulate

from fedit.engines import remote_site
from fedit.engines.channel import ChannelError, Header
from fedit.engines.courier import Courier
from fedit.interfaces import Adapter


class Calls:
    """Calls through a deployment's couriers, which a test may lose, repeat or split."""

    def __init__(self, deployment: Deployment, piece_bytes: int = 8 << 20, inline_bytes: int = 1 << 20) -> None:
        self.folders: Mapping[str, Any] = dict.fromkeys(SITES)
        self._courier = Courier(deployment.server, piece_bytes, inline_bytes)
        self.piece_bytes, self.inline_bytes = piece_bytes, inline_bytes
        self.lost = 0
        self.pieces = 0
        self._chance = random.Random(0)
        self.loses = 0.0

    def call(self, site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        self.pieces += header["do"] in ("put", "get")
        before, after, twice = (self._chance.random() < self.loses for _ in range(3))
        if before:
            self.lost += 1
            raise ChannelError("lost")
        if twice and header["do"] != "hello":
            self._courier.call(site, header, blob, timeout_s)
        answer = self._courier.call(site, header, blob, timeout_s)
        if after:
            self.lost += 1
            raise ChannelError("its answer is lost")
        return answer


def assert_equal(left: Finished, right: Finished) -> None:
    assert left[1] == right[1]
    assert_same_bits(left[0], right[0])


def assert_same_bits(left: Adapter, right: Adapter) -> None:
    for name, tensor in left.tensors.items():
        assert torch.equal(tensor, right.tensors[name]), name


def test_calls_that_are_lost_or_heard_twice_in_pieces(
    made: tuple[Deployment, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tenth of the calls, of the answers, and of both twice; tensors in pieces of 4,000 bytes."""
    monkeypatch.setattr(remote_site, "RETRY_S", (0.01, 0.02))
    deployment, recipe = made
    calls = Calls(deployment, piece_bytes=4000, inline_bytes=0)
    calls.loses = 0.1
    config = load(recipe)
    assert_equal(federate(config, calls), simulate(config, tmp_path / "store"))
    assert calls.lost > 5
    assert calls.pieces > 3 * 3 * 2 * 2


def test_updates_of_many_megabytes(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    deployment, recipe = made
    calls = Calls(deployment, piece_bytes=1 << 20)
    config = load(recipe, "adapter.rank=3000", "rounds=1")
    federated = federate(config, calls)
    assert_equal(federated, simulate(config, tmp_path / "store"))
    assert federated[1][0].bytes_up > 3 * 2 * calls.piece_bytes


def test_a_site_that_is_slow_fails_at_the_deadline_and_its_late_answer_is_not_taken(
    made: tuple[Deployment, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its worker stands still in round 1, and wakes up in round 2."""
    deployment, recipe = made
    (pid,) = deployment.pids("fedit.engines.site", str(deployment.site("a")))
    calls = Calls(deployment)
    monkeypatch.setattr(remote_site, "CALL_S", 3.0)
    asleep = threading.Event()
    call = calls.call

    def sleep(site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        if site == "a" and header["do"] == "train" and header["round"] == 0 and not asleep.is_set():
            asleep.set()
            os.kill(pid, signal.SIGSTOP)
        if site == "b" and header["do"] == "train" and header["round"] == 1:
            os.kill(pid, signal.SIGCONT)
        return call(site, header, blob, timeout_s)

    calls.call = sleep
    config = load(recipe, "rounds=2", "engine.deadline_s=6", "engine.absent_s=3")
    began = time.monotonic()
    try:
        _, records = federate(config, calls)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert list(records[0].failures) == ["a"]
    assert "deadline_s" in records[0].failures["a"] or "could not be reached" in records[0].failures["a"]
    assert not records[1].failures
    assert time.monotonic() - began < 300, "the longest call"
