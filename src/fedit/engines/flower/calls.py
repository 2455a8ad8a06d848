"""A call as a message of Flower's, and what both couriers need."""

from __future__ import annotations

import logging
import signal
import threading

from flwr.app import ConfigRecord, RecordDict

from fedit.logs import log_to_stderr

HEARTBEAT_S = 10
"""The shortest interval that the SuperLink takes; a site counts as gone after twice as long."""
MAX_OBJECTS = 8
"""Parts of a message; ours have three."""
POLL_S = 0.02, 1.0
"""First and longest pause between two questions whether there is a message."""


def content_of(header: str, blob: bytes) -> RecordDict:
    """Return a call, or an answer, as the content of a message: one record, so that it travels as one object."""
    return RecordDict({"call": ConfigRecord({"header": header, "blob": blob})})


def read(content: RecordDict) -> tuple[str, bytes]:
    """Return the header and the blob of a message.

    Raises:
        TypeError: it has no such.
    """
    record = content.get("call")
    if not isinstance(record, ConfigRecord):
        raise TypeError("a message is one record")
    header, blob = record.get("header"), record.get("blob")
    if not isinstance(header, str) or not isinstance(blob, bytes):
        raise TypeError("a message is a header and a blob")
    return header, blob


def until_terminated() -> threading.Event:
    """Return what is set once this process is asked to end; let Flower say what goes wrong and no more."""
    log_to_stderr()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    flower = logging.getLogger("flwr")
    flower.handlers.clear()
    flower.setLevel(logging.WARNING)
    stopped = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stopped.set())
    return stopped
