"""The way from the process that runs the rounds to the sites: the engine's courier on this machine."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedit.engines.channel import ChannelError, Header, call

Traffic = dict[str, dict[str, Any]]
"""By site: the bytes of its calls, ``down`` and ``up``, since the courier started, and when it ``answered`` last."""


class Courier:
    """A `Transport` through the courier that listens in the server's folder, whatever engine it belongs to."""

    def __init__(self, folder: Path, piece_bytes: int = 8 << 20, inline_bytes: int = 1 << 20) -> None:
        self._socket = folder / "courier.sock"
        self.piece_bytes = piece_bytes
        self.inline_bytes = inline_bytes

    def call(self, site: str, header: Mapping[str, Any], blob: bytes, timeout_s: float) -> tuple[Header, bytes]:
        """Return a site's reply; raises ChannelError where there was none within `timeout_s` seconds."""
        return call(self._socket, {**header, "site": site, "timeout_s": timeout_s}, blob, timeout_s + 5.0)

    def sites(self) -> Traffic:
        """Return the sites that the courier can call; none where there is no courier."""
        try:
            return call(self._socket, {"do": "sites"}, timeout_s=5.0)[0].get("sites", {})
        except ChannelError:
            return {}
