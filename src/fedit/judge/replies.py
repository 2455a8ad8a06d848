"""Requests to a judge and its replies; replies are kept in a file by the hash of their request."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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

    def ask(self, requests: Sequence[Request], on_reply: Callable[[Request, Reply | str], None]) -> None:
        """Call `on_reply` with each request and its reply, or why there is none, as they come.

        Raises:
            FeditError: nothing can be asked of this judge, or no longer.
        """
        ...


class Replies:
    """The replies in a file, one JSON object per line; a line is there whole, or not at all."""

    def __init__(self, path: Path, model: str, parameters: Mapping[str, Any]) -> None:
        self._path = path
        self._asked = {"model": model, "parameters": dict(parameters)}
        self._replies: dict[str, Reply] = {}
        if path.is_file():
            keep_lines(path)
            for values in read_lines(path):
                self._replies[values["request"]] = Reply(**values["reply"])

    def get(self, request: Request) -> Reply | None:
        """Return the reply to an equal request, if there is one."""
        return self._replies.get(self._key(request))

    def add(self, request: Request, reply: Reply) -> None:
        """Keep a reply, on the disk when this returns."""
        key = self._key(request)
        values = {
            "text": reply.text,
            "prompt_tokens": reply.prompt_tokens,
            "completion_tokens": reply.completion_tokens,
            "finish_reason": reply.finish_reason,
        }
        append_line(self._path, {"request": key, "model": self._asked["model"], **request.about, "reply": values})
        self._replies[key] = reply

    def _key(self, request: Request) -> str:
        text = json.dumps({**self._asked, "messages": request.messages}, sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()
