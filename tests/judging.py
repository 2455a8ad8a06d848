"""A server of OpenAI's chat completions that behaves, or misbehaves, as a test says."""

from __future__ import annotations

import http.server
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """What the server sends."""

    text: str | None = "8 7\nThe first says more."
    status: int = 200
    body: bytes | None = None
    """Sent as it is, in place of a completion"""
    cut_to: int | None = None
    """The connection closes after so many bytes of the body"""
    after_s: float = 0.0
    headers: dict[str, str] = field(default_factory=dict)
    finish_reason: str = "stop"


@dataclass
class JudgeServer:
    """What was asked, and what is answered."""

    answer: Callable[[int, dict[str, Any]], Answer]
    """Of the number of the request (from 0) and its body"""
    url: str = ""
    models: tuple[str, ...] = ("wise",)
    requests: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(answer: Callable[[int, dict[str, Any]], Answer] = lambda number, asked: Answer()) -> Iterator[JudgeServer]:
    """Give a server on loopback, in a thread."""
    judge = JudgeServer(answer)

    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            models = [{"id": name, "object": "model", "created": 0, "owned_by": "tests"} for name in judge.models]
            self._send(Answer(body=json.dumps({"object": "list", "data": models}).encode()))

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with judge.lock:
                number = len(judge.requests)
                judge.requests.append(asked)
                judge.keys.append(self.headers["authorization"])
                judge.at_once += 1
                judge.most_at_once = max(judge.most_at_once, judge.at_once)
            try:
                self._send(judge.answer(number, asked))
            finally:
                with judge.lock:
                    judge.at_once -= 1

        def _send(self, answer: Answer) -> None:
            time.sleep(answer.after_s)
            body = answer.body if answer.body is not None else json.dumps(_completion(answer)).encode()
            self.send_response(answer.status)
            for name, value in {"content-type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: answer.cut_to])
            if answer.cut_to is not None:
                self.close_connection = True

        def log_request(self, code: Any = "-", size: Any = "-") -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        daemon_threads = True

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that hung up

    server = Server(("127.0.0.1", 0), Handler)
    judge.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield judge
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def error(status: int, message: str, **headers: str) -> Answer:
    """Return an error as OpenAI's servers send it."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Answer(status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()})


def _completion(answer: Answer) -> dict[str, Any]:
    message = {"role": "assistant", "content": answer.text}
    return {
        "id": "completion",
        "object": "chat.completion",
        "created": 0,
        "model": "wise",
        "choices": [{"index": 0, "finish_reason": answer.finish_reason, "message": message}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110},
    }
