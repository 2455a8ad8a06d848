"""What has arrived at a site: the pieces of a message, and the adapter before it."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from fedit.codec import Message
from fedit.engines.channel import Header
from fedit.engines.messages import name_of
from fedit.interfaces import FeditError

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Arriving:
    """A message of which pieces are here."""

    key: str
    size: int
    content: bytearray = field(default_factory=bytearray)

    @property
    def missing(self) -> int | None:
        """Where it goes on; None: it is whole."""
        return len(self.content) if len(self.content) < self.size else None


@dataclass(frozen=True)
class Taken:
    """An adapter's array, and how many bytes came for it."""

    payload: Message
    num_bytes: int


class Inbox:
    """The site's view of what the server sends: an adapter whole, or the step from the one before."""

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self._arriving: _Arriving | None = None
        self._last: tuple[Header, Message] | None = None
        """The adapter taken last"""

    def put(self, header: Header, blob: bytes) -> Header:
        """Take a piece; a piece that is heard twice changes nothing. Returns what to answer."""
        key, offset, size = str(header["key"]), int(header["offset"]), int(header["size"])
        if size > self.max_bytes:
            return {"refused": f"a message of {size:,} bytes; this site takes {self.max_bytes:,} at most"}
        if self._arriving is None or (self._arriving.key, self._arriving.size) != (key, size):
            self._arriving = _Arriving(key, size)
        arrived = self._arriving.content
        if not 0 <= offset <= len(arrived):
            return {"missing": len(arrived)}
        if len(arrived) < offset + len(blob) <= size:
            arrived += blob[len(arrived) - offset :]
        return {}

    def take(self, about: Header, apply: Callable[[Header, Message, Header, Message], Message]) -> Taken | Header:
        """Return the adapter that `about` names, or what to answer because it is not here.

        `apply` makes it of the adapter before, ``about, payload`` of that, and of the new one's ``about`` and its step.
        """
        if self._last is not None and self._last[0]["key"] == about["key"]:
            return Taken(self._last[1], 0)
        arriving, step = self._arriving, about.get("step")
        if arriving is not None and arriving.key == about["key"]:
            if arriving.missing is not None:
                return {"missing": arriving.missing}
            self._arriving = None
            if name_of(about["layout"], arriving.content) != about["key"]:
                return {"missing": 0}
            return self._taken(about, arriving.content, arriving.size)
        if self._last is None or step is None or self._last[0]["key"] != step["from"]:
            return {"missing": 0}
        if arriving is None or arriving.key != step["key"]:
            return {"missing": 0, "step": True}
        if arriving.missing is not None:
            return {"missing": arriving.missing, "step": True}
        self._arriving = None
        try:
            payload = apply(*self._last, about, arriving.content)
        except FeditError as error:
            log.warning("a step cannot be used (%s); asking for the whole adapter", error)
            payload = b""
        if name_of(about["layout"], payload) != about["key"]:
            self._last = None
            return {"missing": 0}
        return self._taken(about, payload, arriving.size)

    def _taken(self, about: Header, payload: Message, num_bytes: int) -> Taken:
        self._last = about, payload
        return Taken(payload, num_bytes)
