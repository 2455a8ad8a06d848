"""The suite of engines behind each engine, and what needs real processes."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
from engine_suite import *  # noqa: F403 (the suite)
from federations import Deployed, Deployment, federate, load

from fedit.engines import remote_site
from fedit.engines.channel import Header


@pytest.fixture
def sites(made: tuple[Deployment, Path], tiny_model_folder: Path) -> Deployed:
    return Deployed(*made, tiny_model_folder)


def test_a_worker_that_stands_still_fails_at_the_deadline(
    made: tuple[Deployment, Path], sites: Deployed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In round 1; it wakes up in round 2, and its late answer is not taken."""
    deployment, recipe = made
    (pid,) = deployment.pids("fedit.engines.site", str(deployment.site("a")))
    monkeypatch.setattr(remote_site, "CALL_S", 3.0)
    asleep = []

    def sleep(site: str, header: Header) -> None:
        if site == "a" and header["do"] == "train" and header["round"] == 0 and not asleep:
            asleep.append(site)
            os.kill(pid, signal.SIGSTOP)
        if site == "b" and header["do"] == "train" and header["round"] == 1:
            os.kill(pid, signal.SIGCONT)

    sites.before = sleep
    config = load(recipe, "rounds=2", "engine.deadline_s=6", "engine.absent_s=3")
    began = time.monotonic()
    try:
        _, records = federate(config, sites)
    finally:
        os.kill(pid, signal.SIGCONT)
    assert list(records[0].failures) == ["a"]
    assert "deadline_s" in records[0].failures["a"] or "could not be reached" in records[0].failures["a"]
    assert not records[1].failures
    assert time.monotonic() - began < 300, "the longest call"
