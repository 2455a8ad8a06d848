"""Messages between processes of one machine, over a Unix socket: a JSON header and a blob of bytes; nothing is pickled.

One connection is one call: a request, a reply. Who may connect is who may open the socket's folder.
"""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from contextlib import suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from fedit.errors import EngineError

log = logging.getLogger(__name__)

MAX_HEADER = 16 << 20
MAX_BLOB = 1 << 30
"""Bytes; what is longer travels in pieces."""
MAX_PATH = 100
"""Of a socket's path, which the system bounds."""

Header = dict[str, Any]
Handle = Callable[[Header, bytes], tuple[Header, bytes]]


class ChannelError(EngineError):
    """A call had no reply: nobody listens, the other process ended, or it took too long."""


def call(path: Path, header: Mapping[str, Any], blob: bytes = b"", timeout_s: float = 60.0) -> tuple[Header, bytes]:
    """Send a request to whoever serves `path`, and return the reply.

    Raises:
        ChannelError: there was none within `timeout_s` seconds.
    """
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.settimeout(timeout_s)
        connected.connect(str(path))
        connected.settimeout(None)
        bound = struct.pack("ll", math.ceil(timeout_s), 0)
        for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):  # so that no half of a message is waited for longer
            connected.setsockopt(socket.SOL_SOCKET, option, bound)
    except OSError as error:
        connected.close()
        raise ChannelError(f"nobody listens at {path} ({error.strerror or error})") from error
    with Connection(connected.detach()) as connection:
        try:
            _send(connection, header, blob)
            if not connection.poll(timeout_s):
                raise ChannelError(f"no reply from {path} within {timeout_s:g} s")
            return _receive(connection)
        except (OSError, EOFError, TypeError, ValueError) as error:
            raise ChannelError(f"the process behind {path} ended before it replied") from error


def serve(path: Path, handle: Handle, stopped: threading.Event) -> None:
    """Answer calls, each in a thread of its own, until `stopped` is set. What `handle` raises becomes a reply
    ``{"error": ...}`` that names the kind of error alone; the log has the rest.

    Raises:
        EngineError: another process serves `path`, or no socket can be made there.
    """
    listener = _listen(path)
    own = path.stat().st_ino
    open_ones: set[socket.socket] = set()
    try:
        while not stopped.is_set():
            with suppress(TimeoutError):
                connected, _ = listener.accept()
                open_ones.add(connected)
                threading.Thread(target=_answer, args=(connected, handle, open_ones), daemon=True).start()
    finally:
        listener.close()
        with suppress(FileNotFoundError):
            if path.stat().st_ino == own:  # and not that of a process that took over
                path.unlink()
        for connected in list(open_ones):  # callers need not wait for calls that cannot end any more
            with suppress(OSError):
                connected.shutdown(socket.SHUT_RDWR)


def _listen(path: Path) -> socket.socket:
    if len(str(path).encode()) > MAX_PATH:
        raise EngineError(f"The path of a socket has at most {MAX_PATH} bytes, {path} is longer. Use a shorter folder.")
    try:
        call(path, {"do": "ping"}, timeout_s=5.0)
    except ChannelError:
        path.unlink(missing_ok=True)  # left by a process that was killed
    else:
        raise EngineError(f"Another process serves {path} already. Stop it first.")
    listener = socket.socket(socket.AF_UNIX)
    try:
        listener.bind(str(path))
    except OSError as error:
        listener.close()
        raise EngineError(f"No socket can be made at {path}: {error.strerror}.") from error
    path.chmod(0o600)
    listener.listen(64)
    listener.settimeout(0.2)
    return listener


def _answer(connected: socket.socket, handle: Handle, open_ones: set[socket.socket]) -> None:
    try:
        connected.settimeout(None)
        with Connection(os.dup(connected.fileno())) as connection:
            header, blob = _receive(connection)
            try:
                reply = ({}, b"") if header.get("do") == "ping" else handle(header, blob)
            except Exception as error:
                log.exception("the call %s failed", header.get("do"))
                reply = {"error": type(error).__name__}, b""
            _send(connection, *reply)
    except (OSError, EOFError, TypeError, ValueError) as error:
        log.info("a connection ended without an answer (%s)", error)
    finally:
        open_ones.discard(connected)
        connected.close()


def _send(connection: Connection, header: Mapping[str, Any], blob: bytes) -> None:
    connection.send_bytes(json.dumps(header, allow_nan=False).encode())
    connection.send_bytes(blob)


def _receive(connection: Connection) -> tuple[Header, bytes]:
    header = json.loads(connection.recv_bytes(MAX_HEADER))
    if not isinstance(header, dict):
        raise TypeError("a header is a JSON object")
    return header, connection.recv_bytes(MAX_BLOB)
