"""Runs mirrored to trackers: the numbers of ``rounds.jsonl``, each once, whatever is interrupted or gone meanwhile."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.request
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from fedit.experiment import PhaseStarted, RoundFinished
from fedit.interfaces import EngineError
from fedit.live import LiveView
from fedit.report import RunFolder
from fedit.server import RoundRecord
from fedit.tracking import TRACKERS, Mirror, check_trackers, told_settings

FAST = ["-o", "evaluation.max_new_tokens=0", "-o", "rounds=3"]


@pytest.fixture
def tracked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The table of trackers, restored after the test."""
    table = dict(TRACKERS)
    monkeypatch.setattr("fedit.tracking.TRACKERS", table)
    return table


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def of_rounds(run: Path, name: str) -> dict[int, float]:
    return {line["round"]: line[name] for line in rounds(run)}


def loss_of(run: Path, model: str) -> float:
    return json.loads((run / "evaluation.json").read_text())["models"][model]["response_loss"]["all"]


@contextmanager
def interrupted_in_round(number: int) -> Iterator[None]:
    """Interrupt the run once this round is saved, and before any tracker has heard of it."""
    shown = LiveView.__call__

    def interrupt(self: LiveView, event: Any) -> None:
        shown(self, event)
        if getattr(event, "record", None) is not None and event.record.round == number:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LiveView, "__call__", interrupt)
        yield


# ------------------------------------------------------------------------------------------------------ TensorBoard


def scalars(run: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(run / "tensorboard"))
    read.Reload()
    return {name: [(each.step, each.value) for each in read.Scalars(name)] for name in read.Tags()["scalars"]}


def test_tensorboard_has_every_round_once(fedit, recipe, tmp_path) -> None:
    """Interrupted between the folder's record and the tracker's, resumed without saying --track again."""
    run = tmp_path / "run"
    with interrupted_in_round(2):
        assert fedit("run", recipe, "--out", run, *FAST, "--track", "tensorboard").status == 130
    assert [step for step, _ in scalars(run)["train_loss"]] == [1]
    done = fedit("run", "--resume", run)
    assert done.status == 0, done.stderr
    assert f"tensorboard: tensorboard --logdir {run / 'tensorboard'}" in done.stderr
    found = scalars(run)
    for name in ("train_loss", "update_norm", "bytes_up", "tokens"):
        assert [step for step, _ in found[name]] == [1, 2, 3]
        assert dict(found[name]) == pytest.approx(of_rounds(run, name))
    assert dict(found["test_loss"]) == pytest.approx(of_rounds(run, "test_loss"))
    assert dict(found["clients"]) == {1: 3, 2: 3, 3: 3}
    assert all(value > 0 for _, value in found["seconds"])
    for model in ("base", "local", "central", "federated"):
        assert found[f"final/{model}/response_loss"][0][1] == pytest.approx(loss_of(run, model))


def test_tracking_changes_nothing(fedit, recipe, tmp_path) -> None:
    for name, option in (("plain", []), ("tracked", ["--track", "tensorboard"])):
        assert fedit("run", recipe, "--out", tmp_path / name, *FAST, *option).status == 0
    for file in ("config.json", "rounds.jsonl", "evaluation.json", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "tracked" / file).read_bytes()


def test_a_finished_run_is_mirrored_afterwards(fedit, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    assert fedit("run", recipe, "--out", run, *FAST).status == 0
    for _ in range(2):
        done = fedit("track", run, "tensorboard")
        assert done.status == 0, done.stderr
        assert [step for step, _ in scalars(run)["train_loss"]] == [1, 2, 3]
        assert scalars(run)["final/federated/response_loss"][0][1] == pytest.approx(loss_of(run, "federated"))


def test_an_unfinished_run_is_not_said_to_be_finished(fedit, recipe, tmp_path, tracked) -> None:
    told: list[Any] = []
    tracked["tensorboard"] = lambda run, known_as: _Noted(told)
    run = tmp_path / "run"
    with interrupted_in_round(2):
        assert fedit("run", recipe, "--out", run, *FAST).status == 130
    assert fedit("track", run, "tensorboard").status == 0
    assert fedit("run", "--resume", run).status == 0
    (run / "evaluation.json").unlink()  # as where it is stopped while it trains the baselines
    assert fedit("track", run, "tensorboard").status == 0
    assert [each for each in told if isinstance(each, bool)] == [False, True, False]


class _Noted:
    """A tracker that keeps what it is told."""

    id, where, rounds_seen = None, "here", 0

    def __init__(self, told: list[Any]) -> None:
        self._told = told

    def log(self, round_number: int, metrics: Any) -> None:
        self._told.append((round_number, dict(metrics)))

    def close(self, final: Any, finished: bool) -> None:
        self._told.append(finished)


def test_a_private_federation_tells_a_tracker_what_its_folder_tells_and_not_when(tmp_path, tracked) -> None:
    told: list[Any] = []
    tracked["noted"] = lambda run, known_as: _Noted(told)
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 1, "privacy": {"noise_multiplier": 1}}}))
    (tmp_path / "partition.json").write_text(json.dumps({"run": "x", "clients": {}, "privacy": {}}))
    (tmp_path / "adapter").mkdir()
    record = RoundRecord(1, ["north"], {"south": "away"}, 2.5, 1.5, 0.1, 700, 600, 99, epsilon=0.5).withheld()
    with Mirror(tmp_path, ["noted"]) as mirror:
        mirror(PhaseStarted("sites", 1))
        (tmp_path / "rounds.jsonl").write_text(json.dumps(asdict(record)) + "\n")
        mirror(RoundFinished(record, 12.5, 1))
        assert told == []
    assert told == [(1, {"epsilon": 0.5}), True]


def test_mlflow_has_the_rounds_of_a_private_federation_once(tmp_path, monkeypatch) -> None:
    from mlflow.tracking import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 2, "privacy": {"noise_multiplier": 1}}}))
    (tmp_path / "partition.json").write_text(json.dumps({"run": "x", "clients": {}, "privacy": {}}))
    record = RoundRecord(1, ["north"], {}, 2.5, 1.5, 0.1, 700, 600, 99, epsilon=0.5).withheld()
    lines = [{**asdict(record), "round": number, "epsilon": number / 2} for number in (1, 2)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # MLflow's store asks SQLAlchemy in an old way
        for _ in range(2):
            with Mirror(tmp_path, ["mlflow"]) as mirror:
                mirror.catch_up()
            assert mirror.problems == {}
    known_as = json.loads((tmp_path / "tracking.json").read_text())["mlflow"]
    history = MlflowClient().get_metric_history(known_as, "epsilon")
    assert [(each.step, each.value) for each in history] == [(1, 0.5), (2, 1.0)]


def test_the_reason_why_a_run_failed_is_told_although_its_folder_is_gone(tmp_path, tracked) -> None:
    told: list[Any] = []
    tracked["noted"] = lambda run, known_as: _Noted(told)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text('{"config": {}}')
    mirror = Mirror(run, ["noted"])
    mirror.catch_up()
    shutil.rmtree(run)

    def fail() -> None:
        with mirror:
            raise EngineError("the real reason")

    with pytest.raises(EngineError, match="the real reason"):
        fail()
    assert told == [False]


def test_no_password_is_told(tmp_path, tracked) -> None:
    def refuse(run: Any, known_as: str | None) -> None:
        raise ConnectionError("nobody at http://anna:se@cret@host:5000/api/2.0")

    tracked["refusing"] = refuse
    (tmp_path / "config.json").write_text('{"config": {}}')
    mirror = Mirror(tmp_path, ["refusing"])
    mirror.catch_up()
    assert mirror.problems == {"refusing": "nobody at http://host:5000/api/2.0"}


def test_no_client_is_named(fedit, recipe, tmp_path) -> None:
    run, path = tmp_path / "run", tmp_path / "named.jsonl"
    rows = [{"instruction": f"{n}?", "response": "yes", "category": "a", "client": "SM"[n % 2] * 5} for n in range(9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = ["cohort.availability={ SSSSS = [[1, 2]] }", "partition.name=natural", "evaluation.baselines=false"]
    options += [f"data.path={path}", "attack.name=label-flip", 'attack.clients=["MMMMM"]']
    options = [part for option in options for part in ("-o", option)]
    done = fedit("run", recipe, "--out", run, *FAST, *options, "--track", "tensorboard")
    assert done.status == 0, done.stderr
    (events,) = (run / "tensorboard").iterdir()
    assert b"cohort.availability" in events.read_bytes()
    for name in (b"SSSSS", b"MMMMM"):
        assert name not in events.read_bytes()
    told = told_settings(RunFolder.read(run))
    assert "SSSSS" not in str(told)
    assert "MMMMM" not in str(told)
    assert told["cohort.availability"] == told["attack.clients"] == "of 1 clients, by name"
    assert told["cohort.min_updates"] == 1


# -------------------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "message"),
    [("mlfow", "Did you mean 'mlflow'?"), ("absent", "Install it: pip install 'fedit[absent]'")],
)
def test_a_tracker_that_cannot_be_used(fedit, recipe, tmp_path, tracked, name, message) -> None:
    tracked["absent"] = tracked["tensorboard"]
    Path("absent").mkdir()  # what `import absent` would find, and no package
    done = fedit("run", recipe, "--out", tmp_path / "run", *FAST, "--track", name)
    assert done.status == 1
    assert message in done.stderr
    assert not (tmp_path / "run").exists()
    assert "is not a run" in fedit("track", tmp_path, name).stderr


def test_weights_and_biases_without_a_key(monkeypatch, tmp_path) -> None:
    """Nobody is asked on the terminal, and nothing is called."""
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    code = "from fedit.tracking import check_trackers; check_trackers(['wandb'])"
    environment = {**os.environ, "HOME": str(tmp_path), "WANDB_CONFIG_DIR": str(tmp_path), "NETRC": str(tmp_path / "n")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "set WANDB_API_KEY" in done.stderr
    check_trackers(["tensorboard", "mlflow"])


class _Failing:
    """A tracker that breaks in its second round."""

    id, rounds_seen, where = "7", 0, "nowhere"

    def __init__(self, run: Any, known_as: str | None) -> None:
        self.known_as = known_as
        self.logged: list[int] = []

    def log(self, round_number: int, metrics: Any) -> None:
        if round_number == 2:
            raise ConnectionError("the server is gone")
        self.logged.append(round_number)

    def close(self, final: Any, finished: bool) -> None:
        pass


def test_a_tracker_that_fails_does_not_end_the_run(fedit, recipe, tmp_path, tracked) -> None:
    made: list[_Failing] = []
    tracked["json"] = lambda run, known_as: made.append(_Failing(run, known_as)) or made[-1]
    run = tmp_path / "run"
    done = fedit("run", recipe, "--out", run, *FAST, "--track", "json", "--track", "tensorboard")
    assert done.status == 0, done.stderr
    assert made[0].logged == [1]
    assert done.stderr.count("the server is gone") == 0, "the library logs it; the command line's handler prints it"
    assert f"json lacks something; once it works:  fedit track {run} json" in done.stderr
    assert [step for step, _ in scalars(run)["train_loss"]] == [1, 2, 3]
    again = fedit("track", run, "json")
    assert again.status == 1
    assert "json: the server is gone" in again.stderr
    assert made[1].known_as == "7"


# ----------------------------------------------------------------------------------------------------------- MLflow


@contextmanager
def mlflow_server(folder: Path, port: int) -> Iterator[str]:
    """Run MLflow's own server as a process on loopback, with its database in `folder`."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    command += ["--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}", "--artifacts-destination", str(folder)]
    with (folder / "log").open("ab") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(240):
            try:
                with urllib.request.urlopen(f"{address}/health", timeout=5):
                    break
            except OSError:
                assert process.poll() is None, (folder / "log").read_text()
                time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(60)


@pytest.fixture
def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@pytest.mark.slow
def test_mlflows_own_server(fedit, recipe, tmp_path, free_port, monkeypatch) -> None:
    """The server is gone for a round, which the run survives; what is missing then comes later, to the same run."""
    from mlflow.tracking import MlflowClient

    run = tmp_path / "run"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    with mlflow_server(tmp_path / "server", free_port) as address:
        with interrupted_in_round(2):
            assert fedit("run", recipe, "--out", run, *FAST, "--track", "mlflow", "--json").status == 130
        known_as = json.loads((run / "tracking.json").read_text())["mlflow"]
        client = MlflowClient(address)
        assert client.get_run(known_as).info.status == "KILLED"
        assert client.get_run(known_as).data.params["client.learning_rate"] == "0.01"
        assert [each.step for each in client.get_metric_history(known_as, "train_loss")] == [1]

    gone = fedit("run", "--resume", run, "--json")
    assert gone.status == 0, gone.stderr
    assert f"fedit track {run} mlflow" in gone.stderr
    assert json.loads(gone.stdout)["folder"] == str(run), "stdout carries the result alone"

    with mlflow_server(tmp_path / "server", free_port) as address:
        for _ in range(2):
            done = fedit("track", run, "mlflow")
            assert (done.status, done.stdout) == (0, ""), done.stderr
        client = MlflowClient(address)
        found = client.get_run(known_as)
        assert found.info.status == "FINISHED"
        for name in ("train_loss", "tokens", "bytes_down"):
            history = [(each.step, each.value) for each in client.get_metric_history(known_as, name)]
            assert [step for step, _ in history] == [1, 2, 3]
            assert dict(history) == pytest.approx(of_rounds(run, name))
        assert found.data.metrics["final/federated/response_loss"] == pytest.approx(loss_of(run, "federated"))
        assert found.data.metrics["final/local/response_loss"] == pytest.approx(loss_of(run, "local"))
        assert len(client.search_runs([found.info.experiment_id])) == 1


# -------------------------------------------------------------------------------------------------- Weights & Biases


def records(file: Path) -> Iterator[Any]:
    """Yield the records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    record = importlib.import_module("wandb.proto.wandb_internal_pb2").Record
    content, position, whole = file.read_bytes(), 7, b""
    while position + 7 <= len(content):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", content[position : position + 7])
        whole += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):
            yield record.FromString(whole)
            whole = b""


@pytest.mark.slow
def test_weights_and_biases_offline(recipe, tmp_path) -> None:
    """As a process of its own: its client starts one that outlives a test."""
    run = tmp_path / "run"
    environment = {**os.environ, "WANDB_MODE": "offline", "WANDB_PROJECT": "pasture"}
    command = [sys.executable, "-m", "fedit.cli", "run", str(recipe), "--out", str(run), *FAST, "--track", "wandb"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    (file,) = run.glob("wandb/offline-run-*/run-*.wandb")
    known_as = json.loads((run / "tracking.json").read_text())["wandb"]
    assert file.name == f"run-{known_as}.wandb"
    history: dict[int, dict[str, float]] = {}
    started, summary = [], {}
    for record in records(file):
        if record.HasField("run"):
            started.append(record.run)
        if record.HasField("history"):
            items = {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.history.item}
            history[record.history.step.num] = items
        if record.HasField("summary"):
            summary |= {(item.key or item.nested_key[0]): json.loads(item.value_json) for item in record.summary.update}
    assert started[0].run_id == known_as
    assert started[0].project == "pasture"
    assert {step: items["train_loss"] for step, items in history.items()} == pytest.approx(of_rounds(run, "train_loss"))
    assert summary["final/federated/response_loss"] == pytest.approx(loss_of(run, "federated"))
    assert "ab 1" not in done.stdout
    assert f"wandb: wandb sync {file.parent}" in done.stderr
