"""Three sites with mutual TLS, as processes on loopback, behind each engine."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from federations import SITES, Deployment, fedit, load, simulate

from fedit.report import RunFolder
from fedit.server import load_state


def start_run(deployment: Deployment, recipe: Path, out: Path, *overrides: str) -> subprocess.Popen[bytes]:
    options = [part for override in overrides for part in ("-o", override)]
    command = ["federation", "run", recipe, "--server", deployment.server, "--out", out, *options]
    with out.with_suffix(".err").open("wb") as errors:
        return subprocess.Popen([sys.executable, "-m", "fedit.cli", *map(str, command)], stderr=errors)


def wait_for_round(out: Path, number: int, timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not (out / "rounds.jsonl").is_file() or len(RunFolder.read(out).rounds) < number:
        assert time.monotonic() < end, "the round did not come"
        time.sleep(0.1)


def assert_like_simulation(recipe: Path, out: Path, store: Path, *overrides: str) -> None:
    """The run in `out` has the bits of the simulation, and its records."""
    adapter, records = simulate(load(recipe, *overrides), store)
    state = load_state(out / "checkpoints")
    assert state is not None
    for name, tensor in adapter.tensors.items():
        assert torch.equal(tensor, state.adapter.tensors[name]), name
    rounds = RunFolder.read(out).rounds
    assert [line["train_loss"] for line in rounds] == [record.train_loss for record in records]
    assert [line["bytes_up"] for line in rounds] == [record.bytes_up for record in records]
    assert not any(line["failures"] for line in rounds)


def test_sites_give_the_bits_of_the_simulation(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    deployment, recipe = made
    out = tmp_path / "run"
    fedit("federation", "run", recipe, "--server", deployment.server, "--out", out)
    assert_like_simulation(recipe, out, tmp_path / "store")
    assert (out / "report.html").is_file()
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    last = RunFolder.read(out).rounds[-1]
    assert set(last["site_losses"]) == set(SITES)


LONG = ("client.local_steps=300", "rounds=6", "engine.absent_s=60")
"""Rounds long enough to kill something in them, and patience for its return."""


def test_whatever_is_killed_the_run_ends_with_the_same_bits(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    """In rounds 2 to 6: a worker, couriers, the engine's server, a whole site that returns, and the run itself."""
    deployment, recipe = made
    out = tmp_path / "run"
    run = start_run(deployment, recipe, out, *LONG)
    wait_for_round(out, 1)
    deployment.kill("fedit.engines.site", str(deployment.site("a")))
    wait_for_round(out, 2)
    deployment.kill_courier("b")
    wait_for_round(out, 3)
    deployment.kill_engine()
    wait_for_round(out, 4)
    deployment.kill_site("c")
    deployment.start("c")
    wait_for_round(out, 5)
    run.kill()
    run.wait()
    assert run.returncode < 0
    done = fedit("federation", "run", "--server", deployment.server, "--resume", out)
    assert "round 6/6" in done.stderr
    assert_like_simulation(recipe, out, tmp_path / "store", *LONG)


def test_an_interrupted_run_finishes_its_round_and_goes_on(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    deployment, recipe = made
    out = tmp_path / "run"
    run = start_run(deployment, recipe, out, *LONG, "rounds=3")
    wait_for_round(out, 1)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert f"--resume {out}" in out.with_suffix(".err").read_text()
    assert len(RunFolder.read(out).rounds) == 2
    fedit("federation", "run", "--server", deployment.server, "--resume", out)
    assert_like_simulation(recipe, out, tmp_path / "store", *LONG, "rounds=3")
