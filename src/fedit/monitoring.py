"""A real federation for Prometheus: what `fedit federation status` shows, as metrics."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from fedit.federation import federation_status


class FederationCollector(Collector):
    """Asks for the status of a server's folder whenever somebody scrapes it."""

    def __init__(self, server: Path) -> None:
        self._server = server

    def collect(self) -> Iterator[Metric]:
        status = federation_status(self._server)
        connected = GaugeMetricFamily("fedit_site_connected", "Whether calls reach the site", labels=["site"])
        answered = GaugeMetricFamily(
            "fedit_site_answered_timestamp_seconds", "When the site answered last", labels=["site"]
        )
        carried = CounterMetricFamily(
            "fedit_site_bytes", "Bytes of calls since the courier started", labels=["site", "direction"]
        )
        for name, site in status["sites"].items():
            connected.add_metric([name], float(site["connected"]))
            if site["answered"] is not None:
                answered.add_metric([name], site["answered"])
            for direction in ("down", "up"):
                carried.add_metric([name, direction], site[direction])
        yield from (connected, answered, carried)
        if status["run"] is not None:
            yield from _of_run(status["run"])


def _of_run(run: dict[str, Any]) -> Iterator[Metric]:
    """Yield the metrics of the last run."""
    yield GaugeMetricFamily("fedit_run_rounds_planned", "Rounds of the last run", value=run["rounds"])
    yield GaugeMetricFamily("fedit_run_rounds_done", "Rounds of it that are finished", value=run["rounds_done"])
    yield CounterMetricFamily("fedit_run_failures", "Clients that failed, over its rounds", value=run["num_failures"])
    for name, what in (("train_loss", "training loss"), ("test_loss", "held-out loss")):
        if run[name] is not None:
            yield GaugeMetricFamily(f"fedit_run_{name}", f"Its last {what}, nats per response token", value=run[name])


@contextmanager
def metrics_served(server: Path, port: int) -> Iterator[int]:
    """Serve the metrics of a server's folder on loopback, at ``/metrics``; yields the port (0 chooses one)."""
    registry = CollectorRegistry()
    registry.register(FederationCollector(server))
    http, thread = start_http_server(port, "127.0.0.1", registry)
    try:
        yield http.server_port
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
