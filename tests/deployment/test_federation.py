"""Three sites with mutual TLS, as processes on loopback, behind each engine."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from federations import SITES, Deployment, fedit, free_port, load, simulate, write_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedit.accounting import spent_epsilon
from fedit.checkpoints import load_state
from fedit.engines.site_folder import SiteFolder
from fedit.report import RunFolder


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
    fedit("federation", "run", recipe, "--server", deployment.server, "--out", out, "--track", "tensorboard")
    assert_like_simulation(recipe, out, tmp_path / "store")
    assert (out / "report.html").is_file()
    assert "at sites of their own" in (out / "adapter" / "README.md").read_text()
    mirrored = EventAccumulator(str(out / "tensorboard"))
    mirrored.Reload()
    numbers = [line["round"] for line in RunFolder.read(out).rounds]
    assert [each.step for each in mirrored.Scalars("train_loss")] == numbers
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
    site = SiteFolder.read(deployment.site("a"))
    before = len([*site.logged()])
    run = start_run(deployment, recipe, out, *LONG, "rounds=3")
    wait_for_round(out, 1)
    end = time.monotonic() + 60
    while not any(line["event"] == "asked to train" and line["round"] == 1 for line in [*site.logged()][before:]):
        assert time.monotonic() < end, "the second round did not begin"
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130
    assert f"--resume {out}" in out.with_suffix(".err").read_text()
    assert len(RunFolder.read(out).rounds) == 2
    fedit("federation", "run", "--server", deployment.server, "--resume", out)
    assert_like_simulation(recipe, out, tmp_path / "store", *LONG, "rounds=3")


PRIVATE = (
    "privacy.noise_multiplier=1",
    "aggregation.name=fedit",
    "aggregation.weighting=uniform",
    "cohort.sampling=poisson",
    "rounds=3",
)


def test_a_run_with_privacy_tells_no_exact_number_and_spends_nothing_twice(
    made: tuple[Deployment, Path], tmp_path: Path
) -> None:
    """Its noise is the system's, its cohorts a secret's, and no site is asked for a loss; killed, it goes on."""
    deployment, recipe = made
    out = tmp_path / "run"
    run = start_run(deployment, recipe, out, *PRIVATE, "client.local_steps=200")
    wait_for_round(out, 1)
    run.kill()
    run.wait()
    fedit("federation", "run", "--server", deployment.server, "--resume", out)
    found = RunFolder.read(out)
    statement = found.partition["privacy"]
    assert statement["noise"] == "the operating system's"
    assert [line["epsilon"] for line in found.rounds] == [spent_epsilon(1.0, 1.0, n, 3**-1.1) for n in (1, 2, 3)]
    assert statement["epsilon"] == found.rounds[-1]["epsilon"]
    for line in found.rounds:
        told = {key: value for key, value in line.items() if value}
        assert told.keys() == {"round", "epsilon", "clip_norm"}
    assert not found.timings
    assert {about["rows"] for about in found.partition["clients"].values()} == {1}
    secret = (out / ".cohorts.secret").read_text()
    for file in (out / "config.json", out / "partition.json", out / "report.html"):
        assert secret not in file.read_text()
        assert str(int(secret, 16)) not in file.read_text()
    options = (*PRIVATE, "client.local_steps=200")
    adapter, _ = simulate(load(recipe, *options), tmp_path / "store")
    again, _ = simulate(load(recipe, *options), tmp_path / "again")
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in adapter.tensors.items()), "it is seeded"
    state = load_state(out / "checkpoints")
    assert state is not None
    assert not all(torch.equal(tensor, state.adapter.tensors[name]) for name, tensor in adapter.tensors.items())


KILLER = """
import os, signal, sys
from pathlib import Path
from fedit import cli, federation

moment, *arguments = sys.argv[1:]
renamed, saved = Path.replace, federation.save_state


def replace(self, target):
    if moment == "temporary name" and target.name == "round-00002.safetensors":
        os.kill(os.getpid(), signal.SIGKILL)
    return renamed(self, target)


def save(state, folder):
    if moment == "between line and checkpoint" and state.round_index == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    saved(state, folder)


Path.replace, federation.save_state = replace, save
cli.main(arguments)
"""


def test_a_run_that_is_killed_while_it_writes_a_checkpoint_goes_on(
    made: tuple[Deployment, Path], tmp_path: Path
) -> None:
    deployment, recipe = made
    out = tmp_path / "run"
    begin = ["federation", "run", "--server", str(deployment.server)]
    for moment, what in (
        ("temporary name", [str(recipe), "--out", str(out)]),
        ("between line and checkpoint", ["--resume", str(out)]),
    ):
        killed = subprocess.run([sys.executable, "-c", KILLER, moment, *begin, *what], capture_output=True, check=False)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert [line["round"] for line in RunFolder.read(out).rounds] == [1, 2, 3], "the last has no checkpoint"
    fedit("federation", "run", "--server", deployment.server, "--resume", out)
    assert_like_simulation(recipe, out, tmp_path / "store")


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for a small disk and a network of its own")


@needs_root
def test_a_site_whose_disk_is_full_fails_until_there_is_room(made: tuple[Deployment, Path], tmp_path: Path) -> None:
    """It cannot write what its client keeps; the others go on."""
    deployment, recipe = made
    disk = deployment.site("c") / "clients"
    disk.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", disk], check=True)
    try:
        out = tmp_path / "run"
        run = start_run(deployment, recipe, out, "client.moments=keep", "rounds=6", "client.local_steps=100")
        wait_for_round(out, 2)
        subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
        assert run.wait(120) == 0
    finally:
        subprocess.run(["umount", "-l", disk], check=True)
    failed = [line["failures"] for line in RunFolder.read(out).rounds]
    assert [list(failures) for failures in failed[:2]] == [["c"], ["c"]]
    assert failed[0]["c"] == "FeditError while it tuned; the site's own log says more"
    assert failed[-1] == {}
    assert "No space left" in (deployment.site("c") / "logs" / "worker.log").read_text()


@pytest.fixture
def network() -> Iterator[tuple[str, str]]:
    """A network of two: the address here, and the name of the namespace at the other end."""
    number = os.getpid() % 250 + 1
    here, there = f"10.77.{number}.1", f"10.77.{number}.2"
    name = f"fedit{number}"
    for command in (
        f"ip netns add {name}",
        f"ip link add {name} type veth peer name inside netns {name}",
        f"ip addr add {here}/24 dev {name}",
        f"ip link set {name} up",
        f"ip -n {name} addr add {there}/24 dev inside",
        f"ip -n {name} link set inside up",
        f"ip -n {name} link set lo up",
    ):
        subprocess.run(command.split(), check=True)
    yield here, name
    subprocess.run(["ip", "link", "del", name], check=True)
    subprocess.run(["ip", "netns", "del", name], check=True)


@needs_root
def test_a_network_that_is_cut_and_healed_changes_nothing(
    tmp_path: Path, tiny_model_folder: Path, engine: str, network: tuple[str, str]
) -> None:
    """A site on a machine of its own cannot be reached for a while in round 2: its packets vanish."""
    host, name = network
    recipe = write_recipe(tmp_path, tiny_model_folder)
    deployment = Deployment(tmp_path / "f", tmp_path / "rows", tiny_model_folder, free_port(), engine, host)
    deployment.start("server", "a", "b")
    deployment.start("c", prefix=["ip", "netns", "exec", name])
    options = (*LONG, "rounds=3")
    try:
        deployment.wait_for_sites(*SITES)
        out = tmp_path / "run"
        run = start_run(deployment, recipe, out, *options)
        wait_for_round(out, 1)
        subprocess.run(["ip", "link", "set", name, "down"], check=True)
        time.sleep(12)
        assert len(RunFolder.read(out).rounds) == 1, "round 2 waits for it"
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
        assert run.wait(200) == 0
    finally:
        deployment.stop()
    assert_like_simulation(recipe, out, tmp_path / "store", *options)


@pytest.mark.skipif(shutil.which("faketime") is None, reason="needs faketime (apt install faketime)")
@pytest.mark.parametrize("who", ["server", "site"])
def test_an_expired_certificate_is_said_before_anything_starts(made: tuple[Deployment, Path], who: str) -> None:
    """By a machine whose clock is two years ahead."""
    deployment, _ = made
    command = ["federation", "serve", deployment.server] if who == "server" else ["site", "start", deployment.site("a")]
    late = ["faketime", "-f", "+730d", sys.executable, "-m", "fedit.cli", *map(str, command)]
    done = subprocess.run(late, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 1
    assert "this machine's clock says" in " ".join(done.stderr.split())
