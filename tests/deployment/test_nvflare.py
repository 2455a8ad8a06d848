"""Three sites behind NVIDIA FLARE with mutual TLS, as processes on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import SITES, Deployment, fedit, load, simulate, write_recipe

from fedit.report import RunFolder
from fedit.server import load_state

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the processes are found in /proc")]
pytest.importorskip("nvflare", reason="needs fedit[nvflare]")


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Iterator[tuple[Deployment, Path]]:
    """A federation that runs, and a recipe for it."""
    folder = tmp_path_factory.mktemp("fed")
    recipe = write_recipe(folder, tiny_model_folder)
    deployment = Deployment(folder / "f", folder / "rows", tiny_model_folder, free_port())
    deployment.start("server", *SITES)
    try:
        deployment.wait_for_sites(*SITES)
        yield deployment, recipe
    finally:
        deployment.stop()


def start_run(deployment: Deployment, recipe: Path, out: Path, *overrides: str) -> subprocess.Popen[str]:
    options = [part for override in overrides for part in ("-o", override)]
    command = ["federation", "run", recipe, "--server", deployment.server, "--out", out, *options]
    return subprocess.Popen([sys.executable, "-m", "fedit.cli", *map(str, command)], stderr=subprocess.PIPE, text=True)


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
