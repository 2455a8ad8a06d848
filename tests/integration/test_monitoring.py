"""What Prometheus reads of a federation."""

from __future__ import annotations

import json
import threading
import urllib.request
from pathlib import Path

import pytest

pytest.importorskip("prometheus_client", reason="needs fedit[metrics]")
from fedit.engines.channel import ChannelError, Header, call, serve
from fedit.monitoring import metrics_served


def scrape(server: Path) -> dict[str, float]:
    with metrics_served(server, 0) as port, urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics") as answer:
        lines = answer.read().decode().splitlines()
    return {name: float(value) for line in lines if not line.startswith("#") for name, value in [line.rsplit(" ", 1)]}


@pytest.fixture
def server(tmp_path: Path) -> Path:
    about = {"engine": "nvflare", "host": "localhost", "port": 1, "sites": ["north", "south"]}
    (tmp_path / "federation.json").write_text(json.dumps(about))
    return tmp_path


def test_a_federation_without_a_courier_or_a_run(server: Path) -> None:
    metrics = scrape(server)
    assert metrics['fedit_site_connected{site="north"}'] == metrics['fedit_site_connected{site="south"}'] == 0
    assert not any("run" in name for name in metrics)


def test_sites_and_the_last_run(server: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (server / "last-run.json").write_text(json.dumps({"folder": str(run)}))
    (run / "config.json").write_text(json.dumps({"config": {"rounds": 5}}))
    rounds = [
        {"round": 1, "failures": {"south/0": "gone"}, "train_loss": 3.0, "test_loss": 2.5},
        {"round": 2, "failures": {}, "train_loss": 2.0, "test_loss": None},
    ]
    (run / "rounds.jsonl").write_text("".join(json.dumps(line) + "\n" for line in rounds))
    stopped = threading.Event()

    def handle(header: Header, blob: bytes) -> tuple[Header, bytes]:
        return {"sites": {"north": {"down": 10, "up": 20, "answered": 123.0}}}, b""

    thread = threading.Thread(target=serve, args=(server / "courier.sock", handle, stopped))
    thread.start()
    try:
        while True:
            try:
                call(server / "courier.sock", {"do": "ping"})
                break
            except ChannelError:
                pass
        metrics = scrape(server)
    finally:
        stopped.set()
        thread.join()
    assert metrics == {
        'fedit_site_connected{site="north"}': 1,
        'fedit_site_connected{site="south"}': 0,
        'fedit_site_answered_timestamp_seconds{site="north"}': 123,
        'fedit_site_bytes_total{direction="down",site="north"}': 10,
        'fedit_site_bytes_total{direction="up",site="north"}': 20,
        'fedit_site_bytes_total{direction="down",site="south"}': 0,
        'fedit_site_bytes_total{direction="up",site="south"}': 0,
        "fedit_run_rounds_planned": 5,
        "fedit_run_rounds_done": 2,
        "fedit_run_failures_total": 1,
        "fedit_run_train_loss": 2,
        "fedit_run_test_loss": 2.5,
    }
