"""Calls over a Unix socket."""

from __future__ import annotations

import pickle
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from fedit.engines import channel
from fedit.engines.channel import ChannelError, Handle, call, serve
from fedit.interfaces import EngineError


@contextmanager
def served(path: Path, handle: Handle) -> Iterator[threading.Event]:
    stopped = threading.Event()
    thread = threading.Thread(target=serve, args=(path, handle, stopped))
    thread.start()
    while thread.is_alive():  # a socket is there a moment before anybody listens
        with suppress(ChannelError):
            call(path, {"do": "ping"})
            break
        time.sleep(0.01)
    try:
        yield stopped
    finally:
        stopped.set()
        thread.join()


def waiting_for(released: threading.Event) -> Handle:
    def wait(header: dict, blob: bytes) -> tuple[dict, bytes]:
        released.wait(10)
        return {}, b""

    return wait


def test_a_call_brings_header_and_blob_there_and_back(tmp_path: Path) -> None:
    with served(tmp_path / "s", lambda header, blob: ({"got": header}, blob[::-1])):
        assert call(tmp_path / "s", {"do": "x", "n": 1}, b"abc") == ({"got": {"do": "x", "n": 1}}, b"cba")


def test_what_the_other_end_raises_is_named_by_its_kind_alone(tmp_path: Path) -> None:
    def fail(header: dict, blob: bytes) -> tuple[dict, bytes]:
        raise ValueError("row 7 of secret.jsonl")

    with served(tmp_path / "s", fail):
        assert call(tmp_path / "s", {"do": "x"}) == ({"error": "ValueError"}, b"")


def test_nobody_listens(tmp_path: Path) -> None:
    with pytest.raises(ChannelError, match="nobody listens"):
        call(tmp_path / "s", {"do": "x"})


def test_an_answer_that_takes_too_long(tmp_path: Path) -> None:
    released = threading.Event()
    with served(tmp_path / "s", waiting_for(released)):
        with pytest.raises(ChannelError, match=r"within 0\.1 s"):
            call(tmp_path / "s", {"do": "x"}, timeout_s=0.1)
        released.set()


def test_calls_that_are_under_way_end_when_the_server_stops(tmp_path: Path) -> None:
    released = threading.Event()
    with served(tmp_path / "s", waiting_for(released)) as stopped:
        threading.Timer(0.2, stopped.set).start()
        with pytest.raises(ChannelError, match="ended before it replied"):
            call(tmp_path / "s", {"do": "x"}, timeout_s=20)
        released.set()


def test_a_socket_that_is_served_is_not_taken_and_one_left_behind_is(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(path, lambda header, blob: ({}, b"")), pytest.raises(EngineError, match=r"serves .* already"):
        serve(path, lambda header, blob: ({}, b""), threading.Event())
    left = socket.socket(socket.AF_UNIX)
    left.bind(str(path))
    left.close()
    with served(path, lambda header, blob: ({"mine": True}, b"")):
        time.sleep(0.3)
        assert call(path, {"do": "x"}) == ({"mine": True}, b"")


def test_a_server_that_stops_late_leaves_the_socket_of_its_successor(tmp_path: Path) -> None:
    path = tmp_path / "s"
    with served(path, lambda header, blob: ({"who": "first"}, b"")):
        path.unlink()  # as a successor does, which could not reach the first
        with served(path, lambda header, blob: ({"who": "second"}, b"")):
            pass
        second = threading.Event()
        answer = lambda header, blob: ({"who": "second"}, b"")
        thread = threading.Thread(target=serve, args=(path, answer, second), daemon=True)
        thread.start()
        while not path.exists():
            time.sleep(0.01)
    assert call(path, {"do": "x"}) == ({"who": "second"}, b"")
    second.set()
    thread.join()


def test_a_pickle_is_no_message(tmp_path: Path) -> None:
    """It is never loaded: the connection ends, and the next call is answered."""
    proof = tmp_path / "proof"

    class Bad:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (proof,)  # type: ignore[return-value]

    with served(tmp_path / "s", lambda header, blob: ({}, blob)):
        with Client(str(tmp_path / "s"), family="AF_UNIX") as connection:
            with suppress(OSError):  # the other end hangs up at the first part, or later
                connection.send_bytes(pickle.dumps(Bad()))
                connection.send_bytes(b"")
            with pytest.raises((EOFError, OSError)):
                connection.recv_bytes()
        assert call(tmp_path / "s", {"do": "x"}, b"fine") == ({}, b"fine")
    assert not proof.exists()


def test_messages_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(channel, "MAX_BLOB", 100)
    with (
        served(tmp_path / "s", lambda header, blob: ({}, b"")),
        pytest.raises(ChannelError, match="ended before it replied"),
    ):
        call(tmp_path / "s", {"do": "x"}, bytes(101))


def test_a_path_that_the_system_cannot_bind(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="shorter folder"):
        serve(tmp_path / ("x" * 120), lambda header, blob: ({}, b""), threading.Event())
