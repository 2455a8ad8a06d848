"""Requests to a judge and its replies; replies are kept in a file by the hash of their request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from fedit.files import append_line, keep_lines
from fedit.judge.protocol import Messages
from fedit.report.folder import read_lines


@dataclass(frozen=True, slots=True)
class Request:
    """One thing that a judge is asked."""

    messages: Messages
    about: Mapping[str, Any] = field(default_factory=dict)
    """For the reader of the file of replies; no part of the hash"""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a judge answered."""

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    """``length``: it was cut at the most tokens that a reply may have"""


class Judge(Protocol):
    """Whoever gives scores."""

    @property
    def model(self) -> str: ...

    @property
    def where(self) -> str:
        """The server, or the kind of local judge, as people call it."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the reply depends on, beside the model and the messages."""
        ...

    @property
    def most_tokens(self) -> int | None:
        """Of a reply; None: no limit is known."""
        ...

    def check(self) -> None:
        """Make sure that the judge can be asked, as far as that can be known without asking.

        Raises:
            FeditError: it cannot.
        """
        ...

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[Request, Reply | str], None], num_answered: int = 0
    ) -> None:
        """Call `on_reply` with each request and its reply, or why there is none, as they come.

        `num_answered` requests like these were answered before: who answers some is not given up for a few others.

        Raises:
            FeditError: nothing can be asked of this judge, or no longer.
        """
        ...


class Replies:
    """The replies in a file, one JSON object per line, or why a request got none; a line is whole, or not there.

    Nothing is written before there is something to add: another process may be adding to the file.
    """

    def __init__(self, path: Path, model: str, parameters: Mapping[str, Any]) -> None:
        self._path = path
        self._asked = {"model": model, "parameters": dict(parameters)}
        self._replies: dict[str, Reply] = {}
        self._failed: set[str] = set()
        self._ends_whole = False
        for values in read_lines(path):
            if "reply" in values:
                self._replies[values["request"]] = Reply(**values["reply"])
            else:
                self._failed.add(values["request"])

    def get(self, request: Request) -> Reply | None:
        """Return the reply to an equal request, if there is one."""
        return self._replies.get(self._key(request))

    def has_failed(self, request: Request) -> bool:
        """Tell whether an equal request was asked and got no reply."""
        return self._key(request) in self._failed

    def add(self, request: Request, reply: Reply | str) -> None:
        """Keep a reply, or why there is none, on the disk when this returns."""
        key = self._key(request)
        if not self._ends_whole:
            keep_lines(self._path)
            self._ends_whole = True
        told = {"no_reply": reply} if isinstance(reply, str) else {"reply": asdict(reply)}
        append_line(self._path, {"request": key, "model": self._asked["model"], **request.about, **told})
        if isinstance(reply, str):
            self._failed.add(key)
        else:
            self._replies[key] = reply

    def _key(self, request: Request) -> str:
        text = json.dumps({**self._asked, "messages": request.messages}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
