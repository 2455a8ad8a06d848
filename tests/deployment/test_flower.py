"""What Flower's set-up lets nobody do."""

from __future__ import annotations

import json
import shutil
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path

import psutil
import pytest
from federations import SITES, Deployment, free_port

pytest.importorskip("flwr", reason="needs fedit[flower]")
import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.app import ConfigRecord, Message, RecordDict
from flwr.cli.build import build_fab_from_files
from flwr.proto import fleet_pb2, node_pb2
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supernode import node_auth_http_interceptor
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fedit.engines import certificates
from fedit.engines.flower import kits, server
from fedit.engines.flower.site import MAX_OBJECT, SiteCourier, serve_site

ENGINE = "flower"


@pytest.fixture
def address(made: tuple[Deployment, Path]) -> str:
    """Where the sites reach the server."""
    deployment, _ = made
    return f"https://localhost:{json.loads((deployment.server / 'federation.json').read_text())['port']}"


@pytest.fixture
def superlink(made: tuple[Deployment, Path]) -> str:
    """Where the SuperLink listens."""
    deployment, _ = made
    (pid,) = deployment.pids("flower_superlink", str(deployment.folder))
    listening = [each.laddr for each in psutil.Process(pid).net_connections() if each.status == psutil.CONN_LISTEN]
    assert {found.ip for found in listening} == {"127.0.0.1"}, "it listens on loopback alone"
    return f"127.0.0.1:{listening[0].port}"


def context(folder: Path, name: str | None) -> ssl.SSLContext:
    """Trust the authority of a kit, and show the certificate of `name`."""
    made = ssl.create_default_context(cafile=str(folder / "kit" / "ca.pem"))
    if name is not None:
        made.load_cert_chain(folder / "kit" / f"{name}.pem", folder / "kit" / f"{name}.key")
    return made


@pytest.mark.parametrize(
    "path",
    [
        "/v1/control/start-run",
        "/v1/control/list-nodes",
        "/v1/runtime/acquire-task",
        "/v1/runtime/push-messages",
        "/v1/fleet/register-node",
        "/v1/fleet/unregister-node",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
        "/docs",
        "/openapi.json",
        "/health",
        "/",
    ],
)
def test_sites_reach_the_fleet_api_and_nothing_else(
    made: tuple[Deployment, Path], address: str, superlink: str, path: str
) -> None:
    deployment, _ = made
    with httpx.Client(verify=context(deployment.site("a"), "a")) as client:
        answer = client.post(httpx.URL(address, raw_path=path.encode()))
    assert (answer.status_code, "nginx" in answer.headers["server"]) == (403, True)


def test_only_certificates_of_the_authority_get_in(made: tuple[Deployment, Path], address: str, tmp_path: Path) -> None:
    deployment, _ = made
    kits.make_kits(tmp_path, "localhost", 1, ["a"])
    foreign = ssl.create_default_context(cafile=str(deployment.site("a") / "kit" / "ca.pem"))
    foreign.load_cert_chain(tmp_path / "sites" / "a" / "kit" / "a.pem", tmp_path / "sites" / "a" / "kit" / "a.key")
    for verify, says in ((context(deployment.site("a"), None), "NONE"), (foreign, "FAILED")):
        with httpx.Client(verify=verify) as client:
            answer = client.post(f"{address}/v1/fleet/activate-node")
        assert answer.status_code == 403
        assert f"this certificate is refused: {says}" in answer.text
    with httpx.Client(verify=context(deployment.site("a"), "a")) as client:
        assert client.post(f"{address}/v1/fleet/activate-node").status_code == 415, "the SuperLink's answer to nothing"


def fleet(deployment: Deployment, address: str, key: ec.EllipticCurvePrivateKey) -> FleetHttpClient:
    """Return a client with the certificate of site a that signs with `key`."""
    signs = NodeAuthHttpInterceptor(key, key.public_key())
    return FleetHttpClient(address, interceptors=[signs], verify=context(deployment.site("a"), "a"))


def test_a_site_is_its_key(made: tuple[Deployment, Path], address: str, superlink: str) -> None:
    """Another key is refused, and nobody takes the messages of another site, with whatever certificate."""
    deployment, _ = made
    key, public = generate_key_pairs()
    nodes = server.register_sites(superlink, deployment.server / "kit")
    with fleet(deployment, address, key) as client:
        with pytest.raises(httpx.HTTPStatusError) as refused:
            client.ActivateNode(
                fleet_pb2.ActivateNodeRequest(public_key=public_key_to_bytes(public), heartbeat_interval=30)
            )
        assert refused.value.response.status_code == 412
    with closing(SiteCourier(deployment.site("a"), "a")) as courier, pytest.raises(httpx.HTTPStatusError) as refused:
        courier._client.PullMessages(fleet_pb2.PullMessagesRequest(node=node_pb2.Node(node_id=nodes["b"])))
    assert refused.value.response.status_code == 401


EVIL = b"""
import pathlib
pathlib.Path(PROOF).write_text("ran")
from flwr.clientapp import ClientApp
app = ClientApp()
"""


def test_code_that_arrives_is_run_nowhere(
    made: tuple[Deployment, Path], superlink: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An app with code, started by whoever reaches the SuperLink, and messages of it, even one that is no call."""
    deployment, _ = made
    proof = tmp_path / "proof"
    app = server.APP.replace(b"fedit.engines.flower:none", b"evil:app")
    files = {"pyproject.toml": app, "evil.py": EVIL.replace(b"PROOF", repr(str(proof)).encode())}
    monkeypatch.setattr(server, "build_fab_from_files", lambda _: build_fab_from_files(files))
    kit = deployment.server / "kit"
    grid = server.start_run(superlink, kit)
    for content in ({"header": json.dumps({"do": "hello"}), "blob": b""}, {"anything": "else"}):
        messages = [
            Message(RecordDict({"call": ConfigRecord(dict(content))}), node, "train")
            for node in server.register_sites(superlink, kit).values()
        ]
        assert all(grid.push_messages(messages))
    time.sleep(5)
    grid.close()
    assert not proof.exists()
    assert not deployment.pids("flwr-clientapp") + deployment.pids("flwr-serverapp")
    logged = (deployment.site("a") / "logs" / "engine.log").read_text()
    assert "a message is a header and a blob" in logged
    deployment.wait_for_sites(*SITES)


def test_nothing_of_flower_calls_home(made: tuple[Deployment, Path]) -> None:
    deployment, _ = made
    found = deployment.pids("flower", str(deployment.folder))
    assert len(found) == 2 + len(SITES)
    for pid in found:
        environment = psutil.Process(pid).environ()
        assert kits.ENVIRONMENT.items() <= environment.items()
        for connection in psutil.Process(pid).net_connections():
            assert not connection.raddr or connection.raddr.ip in ("127.0.0.1", "::1")


@pytest.fixture
def answering() -> Iterator[tuple[str, dict[str, object]]]:
    """A server that answers what a test says."""
    import http.server

    answer: dict[str, object] = {}

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(200)
            for name, value in answer.items():
                self.send_header(name, str(value))
            self.end_headers()

        def log_request(self, code: object = "-", size: object = "-") -> None: ...

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as listening, ThreadPoolExecutor(1) as threads:
        threads.submit(listening.serve_forever)
        yield f"http://127.0.0.1:{listening.server_port}", answer
        listening.shutdown()


@pytest.mark.parametrize(
    "headers", [{"content-length": MAX_OBJECT + 1}, {}, {"content-length": 10, "content-encoding": "gzip"}]
)
def test_a_site_reads_no_answer_without_bounds(
    made: tuple[Deployment, Path], answering: tuple[str, dict[str, object]], headers: dict[str, object]
) -> None:
    deployment, _ = made
    url, answer = answering
    answer |= headers
    with closing(SiteCourier(deployment.site("a"), "a")) as courier:
        courier._client._base_url = url
        with pytest.raises(httpx.DecodingError, match="an answer of"):
            courier._client.PullMessages(fleet_pb2.PullMessagesRequest())


def take_part(folder: Path, name: str, caplog: pytest.LogCaptureFixture, seconds: float = 3.0) -> str:
    """Let a site's courier try to connect for a while, and return what its operator reads."""
    stopped = threading.Event()
    threading.Timer(seconds, stopped.set).start()
    with caplog.at_level("WARNING"):
        serve_site(folder, name, stopped)
    return caplog.text


def test_what_a_site_reads_of_an_expired_certificate(
    made: tuple[Deployment, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployment, _ = made
    shutil.copytree(deployment.site("a"), tmp_path / "a", ignore=lambda *_: ["worker.sock"])
    monkeypatch.setattr(certificates, "LEEWAY", timedelta(days=3))
    monkeypatch.setattr(certificates, "HOLDER_DAYS", -1)
    certificates.make_certificate(deployment.folder / "authority", tmp_path / "a" / "kit", "a")
    assert "this certificate is refused: FAILED:certificate has expired" in take_part(tmp_path / "a", "a", caplog)


def test_what_a_site_reads_of_a_server_of_another_name_or_that_is_not_there(
    made: tuple[Deployment, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    deployment, _ = made
    shutil.copytree(deployment.site("a"), tmp_path / "a", ignore=lambda *_: ["worker.sock"])
    about = tmp_path / "a" / "kit" / "server.json"
    port = json.loads(about.read_text())["port"]
    about.write_text(json.dumps({"host": "127.0.0.2", "port": port}))
    assert "IP address mismatch, certificate is not valid for '127.0.0.2'" in take_part(tmp_path / "a", "a", caplog)
    about.write_text(json.dumps({"host": "localhost", "port": free_port()}))
    assert "Connection refused" in take_part(tmp_path / "a", "a", caplog)


def test_what_a_site_reads_when_the_clocks_differ(
    made: tuple[Deployment, Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    deployment, _ = made
    monkeypatch.setattr(node_auth_http_interceptor, "now", lambda: datetime.now(UTC) - timedelta(hours=1))
    assert "the clocks of the two differ" in take_part(deployment.site("a"), "a", caplog)
