"""A stand-in for the Hugging Face Hub: the few calls that an upload makes, answered over HTTP on loopback."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Hub:
    """What the stand-in was asked, and what it holds."""

    token: str
    repositories: dict[str, bool] = field(default_factory=dict)
    """Whether each is private"""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""


@contextmanager
def hub_server(token: str) -> Iterator[Hub]:
    """Serve a Hub that lets `token` write."""
    hub = Hub(token)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers.get("Content-Length") or 0)))

        def _answer(self, body: bytes) -> None:
            hub.asked.append(f"{self.command} {self.path}")
            allowed = self.headers.get("Authorization") == f"Bearer {hub.token}"
            status, answer = answered(hub, self.path.partition("?")[0], body) if allowed else (401, {"error": "token"})
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_request(self, code: int | str = "-", size: int | str = "-") -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def answered(hub: Hub, path: str, body: bytes) -> tuple[int, Any]:
    """Return the status and the content of an answer."""
    if path == "/api/repos/create":
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        url = f"{hub.endpoint}/{name}"
        if name in hub.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        hub.repositories[name] = asked.get("visibility") == "private" or bool(asked.get("private"))
        hub.files[name] = {}
        return 200, {"url": url}
    if path == "/api/validate-yaml":
        return 200, {"warnings": [], "errors": []}
    name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
    if name not in hub.repositories:
        return 404, {"error": "Repository not found"}
    if path.endswith("/preupload/main"):
        files = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
        return 200, {"files": [{**file, "shouldIgnore": False} for file in files]}
    if path.endswith("/commit/main"):
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                hub.files[name][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "deletedFile":
                del hub.files[name][line["value"]["path"]]
        commit = f"{hub.endpoint}/{name}/commit/{'0' * 40}"
        return 200, {"success": True, "commitOid": "0" * 40, "commitUrl": commit}
    if path.endswith("/tree/main"):
        files = hub.files[name].items()
        return 200, [{"type": "file", "oid": "0" * 40, "path": file, "size": len(content)} for file, content in files]
    siblings = [{"rfilename": file} for file in hub.files[name]]
    return 200, {"id": name, "private": hub.repositories[name], "sha": "0" * 40, "siblings": siblings, "tags": []}
