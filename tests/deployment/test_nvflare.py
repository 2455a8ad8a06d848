"""Three sites behind NVIDIA FLARE with mutual TLS, as processes on loopback."""

from __future__ import annotations

import json
import shutil
import signal
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

pytest.importorskip("nvflare", reason="needs fedit[nvflare]")
from fedit.engines import nvflare

pytestmark = [pytest.mark.slow, pytest.mark.skipif(sys.platform != "linux", reason="the processes are found in /proc")]


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


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Here as at the sites, which share the cores; other sums have other bits."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
    """In rounds 2 to 6: a worker, a courier, FLARE's server, a whole site that returns, and the run itself."""
    deployment, recipe = made
    out = tmp_path / "run"
    run = start_run(deployment, recipe, out, *LONG)
    wait_for_round(out, 1)
    deployment.kill("fedit.engines.site", str(deployment.site("a")))
    wait_for_round(out, 2)
    deployment.kill("worker_process", str(deployment.site("b")))
    wait_for_round(out, 3)
    deployment.kill("server_train")
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


# ---------------------------------------------------------------------------------------------------------- security


SUBMIT = """
import sys, time
from nvflare.fuel.flare_api.flare_api import new_secure_session
kit, user, job = sys.argv[1:]
session = new_secure_session(user, kit, timeout=20)
try:
    job = session.submit_job(job)
    while not str(status := session.get_job_status(job)).startswith("FINISHED"):
        time.sleep(0.5)
    print("status", status)
finally:
    session.close()
"""


def submit(deployment: Deployment, job: Path) -> str:
    """Submit a job with the operator's certificate, and return how it ended."""
    command = [sys.executable, "-c", SUBMIT, str(deployment.server / "operator"), nvflare.OPERATOR, str(job)]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=90).stdout


def test_sites_run_no_code_that_arrives_and_no_class_but_the_courier(
    made: tuple[Deployment, Path], tmp_path: Path
) -> None:
    deployment, _ = made
    proof = tmp_path / "proof"
    job = tmp_path / "job"
    nvflare.write_job(job, SITES)
    custom = job / "app" / "custom"
    custom.mkdir()
    (custom / "mine.py").write_text(
        f"import pathlib\npathlib.Path({str(proof)!r}).write_text('ran')\nclass Site: pass\n"
    )
    config = job / "app" / "config" / "config_fed_client.json"
    config.write_text(config.read_text().replace("fedit.engines.nvflare.SiteCourier", "mine.Site"))
    assert "status FINISHED" in submit(deployment, job)
    assert "BYOC not permitted" in logs_of(deployment.server)  # which has the same policy as the sites
    other = tmp_path / "other"
    nvflare.write_job(other, SITES)
    config = other / "app" / "config" / "config_fed_client.json"
    config.write_text(config.read_text().replace("fedit.engines.nvflare.SiteCourier", "subprocess.Popen"))
    assert "status FINISHED" in submit(deployment, other)
    assert not proof.exists()
    assert "subprocess.Popen" in logs_of(deployment.site("a"))


def logs_of(folder: Path) -> str:
    return "".join(file.read_text(errors="replace") for file in (folder / "logs").glob("*.log"))


def test_certificates_of_another_authority_are_refused(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    """Even those of a site of the same name that trusts the right server."""
    deployment, _ = made
    port = json.loads((deployment.server / "federation.json").read_text())["port"]
    nvflare.make_kits(tmp_path / "other", "localhost", port, ["d"])
    site = tmp_path / "other" / "sites" / "d"
    shutil.copy(deployment.site("a") / "kit" / "startup" / "rootCA.pem", site / "kit" / "startup" / "rootCA.pem")
    command = nvflare.site_command(site, "d")
    with (tmp_path / "d.log").open("wb") as output:
        stranger = subprocess.Popen(command, cwd=site / "kit", stdout=output, stderr=subprocess.STDOUT)
        time.sleep(12)
        stranger.kill()
        stranger.wait()
    assert "Successfully registered" not in (tmp_path / "d.log").read_text()
    assert "d@" not in (deployment.server / "logs" / "engine.log").read_text(errors="replace")
