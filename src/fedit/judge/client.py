"""A judge behind an OpenAI-compatible server: concurrent, paced, with retries."""

from __future__ import annotations

import asyncio
import importlib.util
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit, urlunsplit

from fedit.interfaces import ConfigError, EngineError, did_you_mean
from fedit.judge.replies import Reply, Request

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI
    from openai.types.chat import ChatCompletion

logger = logging.getLogger(__name__)

KEY, URL = "OPENAI_API_KEY", "OPENAI_BASE_URL"
"""Environment variables; the key is read from there alone, and is never written anywhere"""
DEFAULT_PARAMETERS: Mapping[str, Any] = {"temperature": 0, "max_tokens": 512}
FIRST_WAIT_S = 1.0
"""Before the first retry; twice as long before each next one"""
LONGEST_WAIT_S = 60.0
"""Between two attempts, whatever the server asks for"""
MOST_GIVEN_UP = 5
"""Requests in a row that get no reply, until the server is taken for gone; refused from the first on, for unwilling"""


@dataclass(frozen=True)
class ServerJudge:
    """A model behind a server that speaks OpenAI's chat completions."""

    model: str
    base_url: str | None = None
    """None: that of the environment, or OpenAI's own"""
    parameters: Mapping[str, Any] = field(default_factory=lambda: dict(DEFAULT_PARAMETERS))
    """Of every request, beside model and messages"""
    concurrency: int = 8
    requests_per_minute: float | None = None
    retries: int = 5
    timeout_s: float = 120.0
    """Of one attempt"""

    def __post_init__(self) -> None:
        if importlib.util.find_spec("openai") is None:
            raise ConfigError(
                "A judge behind a server needs the package openai. Install it: pip install 'fedit[judge]'. A local "
                "model judges without it (--local)."
            )
        numbers = {"concurrency": self.concurrency, "timeout-s": self.timeout_s, "retries": self.retries + 1}
        for name, value in {**numbers, "requests-per-minute": self.requests_per_minute or 1}.items():
            if value <= 0:
                raise ConfigError(f"--{name} is {value - (name == 'retries')}: too small.")
        if (url := self._url) and not _is_address(url):
            raise ConfigError(
                f"--base-url (or {URL}) {self.where!r}: expected a URL that begins with http:// or https://, such as "
                "http://localhost:8000/v1."
            )
        if not (self._key.isascii() and self._key.isprintable()):
            raise ConfigError(f"The environment variable {KEY} holds characters that no key has. Set it again.")

    def check(self) -> None:
        """Raise ConfigError where there is no key for OpenAI."""
        if not self._key and self.where == "OpenAI":
            raise ConfigError(
                f"No key for OpenAI: the environment variable {KEY} is not set. Set it, or give --base-url for another "
                "server (local ones need no key), or --local for a model of this machine."
            )

    @property
    def where(self) -> str:
        """The server's address, without the user and password that a URL may have."""
        if not self._url:
            return "OpenAI"
        parts = urlsplit(self._url)
        return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))

    @property
    def most_tokens(self) -> int | None:
        """Of a reply; None: no limit is known."""
        limits = [self.parameters[name] for name in ("max_completion_tokens", "max_tokens") if name in self.parameters]
        return limits[0] if limits and isinstance(limits[0], int) else None

    @property
    def _url(self) -> str:
        return self.base_url or os.environ.get(URL, "")

    @property
    def _key(self) -> str:
        return os.environ.get(KEY, "").strip()

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[Request, Reply | str], None], num_answered: int = 0
    ) -> None:
        """Call `on_reply` with each request and its reply, or why there is none, as they come.

        The first request goes alone: what is wrong with the address, the key or the model shows before another is
        sent. What a server refuses of one request, or does not answer after all retries, is left out, once there is an
        answer to another (`num_answered` of which came before).

        Raises:
            EngineError: the server refuses the key, the model or the first `MOST_GIVEN_UP` requests, is not there, or
                `MOST_GIVEN_UP` requests in a row got no reply.
        """
        if not requests:
            return
        try:
            asyncio.run(self._ask_all(requests, on_reply, num_answered))
        except ExceptionGroup as group:
            raise group.exceptions[0] from None

    async def _ask_all(
        self, requests: Sequence[Request], on_reply: Callable[[Request, Reply | str], None], num_answered: int
    ) -> None:
        from openai import AsyncOpenAI

        client = AsyncOpenAI(
            api_key=self._key or "none", base_url=self._url or None, max_retries=0, timeout=self.timeout_s
        )
        pace = Pace(self.requests_per_minute)
        waiting = iter(requests)
        num_refused = 0
        given_up = list[tuple[Request, str]]()  # in a row: whose fault it is, the next reply to another tells

        def give_up() -> None:
            while given_up:
                on_reply(*given_up.pop(0))

        async def work(*, until_answered: bool = False) -> None:
            nonlocal num_answered, num_refused
            for request in waiting:
                try:
                    reply = await self._ask_one(client, pace, request)
                    num_answered += 1
                    give_up()
                    on_reply(request, reply)
                except _RefusedError as error:
                    num_refused += 1
                    if not num_answered and num_refused == MOST_GIVEN_UP:
                        raise EngineError(f"The judge at {self.where} refuses what it is asked: {error}") from error
                    on_reply(request, str(error))
                except _NoReplyError as error:
                    given_up.append((request, str(error)))
                    if not num_answered or len(given_up) == MOST_GIVEN_UP:
                        raise EngineError(self._gone(error, len(given_up))) from error
                if until_answered and num_answered:
                    return

        async with client:
            await work(until_answered=True)
            async with asyncio.TaskGroup() as group:
                for _ in range(min(self.concurrency, len(requests) - 1)):
                    group.create_task(work())
        give_up()

    async def _ask_one(self, client: AsyncOpenAI, pace: Pace, request: Request) -> Reply:
        """Return the reply; raise _RefusedError, or _NoReplyError after the last attempt."""
        for attempt in range(self.retries):
            await pace.turn()
            try:
                return await self._attempt(client, request)
            except _NoReplyError as error:
                logger.info("Attempt %d of %d: %s", attempt + 1, self.retries + 1, error)
                if error.asked_wait_s is None:
                    await asyncio.sleep(min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S))
                else:
                    pace.hold(min(error.asked_wait_s, LONGEST_WAIT_S))
        await pace.turn()
        return await self._attempt(client, request)

    async def _attempt(self, client: AsyncOpenAI, request: Request) -> Reply:
        """Return the reply; raise _RefusedError, _NoReplyError, or EngineError where no request would fare better."""
        import openai

        try:
            completion = await client.chat.completions.create(
                model=self.model,
                messages=request.messages,  # pyright: ignore[reportArgumentType] (a typed dict for each role)
                extra_body=dict(self.parameters),
            )
        except openai.APIStatusError as error:
            said = self._said(error)
            if error.status_code in {401, 403}:
                raise EngineError(f"The judge at {self.where} refuses the key: {said}. {self._about_key()}") from error
            if error.status_code == 404:
                raise EngineError(
                    f"The judge at {self.where} knows no model {self.model!r}, or is no such server: {said}. "
                    f"{await self._known_models(client)}"
                ) from error
            if error.code == "insufficient_quota":
                raise EngineError(f"The account at {self.where} is used up: {said}.") from error
            if error.status_code in {408, 409, 425, 429} or error.status_code >= 500:
                raise _NoReplyError(said, _retry_after(error)) from error
            raise _RefusedError(said) from error
        except openai.APIConnectionError as error:
            raise _NoReplyError(self._clean(f"{error} {error.__cause__ or ''}".strip())) from error
        except (ValueError, openai.APIResponseValidationError) as error:  # half a JSON object, a page of HTML
            raise _NoReplyError(f"the reply is no chat completion: {self._clean(str(error))}") from error
        return _reply(completion)

    def _said(self, error: APIStatusError) -> str:
        body = error.body if isinstance(error.body, dict) else {}
        # What is cut before the key is taken out may end in the middle of it.
        text = self._clean(str(body.get("message") or error.response.text or "nothing").strip())
        return f"{error.status_code}, {text if len(text) <= 300 else text[:300] + '...'}"

    def _clean(self, text: str) -> str:
        """Return what a server said without the key, which some repeat."""
        return text.replace(self._key, "***") if self._key else text

    def _about_key(self) -> str:
        return f"Check {KEY}." if self._key else f"Set the environment variable {KEY}."

    async def _known_models(self, client: AsyncOpenAI) -> str:
        import openai

        try:
            names = [model.id async for model in client.models.list(timeout=10)]
        except (openai.OpenAIError, ValueError, AttributeError, TypeError):
            names = []
        if self.model in names:
            return "It lists the model all the same: look at the server's own log."
        if names:
            return did_you_mean(self.model, names)
        return "Expected the URL up to and with /v1, such as http://localhost:8000/v1."

    def _gone(self, error: _NoReplyError, num_requests: int) -> str:
        given_up = "The first request" if num_requests == 1 else f"{num_requests} requests in a row"
        problem = str(error).rstrip(".")
        return (
            f"{given_up} to the judge at {self.where} got no reply in {self.retries + 1} attempts. The last problem: "
            f"{problem}. Check --base-url and the server. What was answered is kept, and the same command goes on."
        )


def _is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port
        return False


class _NoReplyError(Exception):
    """An attempt that may go better another time."""

    def __init__(self, problem: str, asked_wait_s: float | None = None) -> None:
        super().__init__(problem)
        self.asked_wait_s = asked_wait_s


class _RefusedError(Exception):
    """The server does not want this request."""


class Pace:
    """Lets requests go one after another, so many a minute; all wait while the server asks for it."""

    def __init__(self, per_minute: float | None) -> None:
        self._gap_s = 60 / per_minute if per_minute else 0.0
        self._next = 0.0

    async def turn(self) -> None:
        """Wait for the next place in the line."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + self._gap_s
        await asyncio.sleep(at - now)

    def hold(self, seconds: float) -> None:
        """Let nobody go for so long."""
        self._next = max(self._next, time.monotonic() + seconds)


def _retry_after(error: APIStatusError) -> float | None:
    """Return the seconds that a server asks to be left alone, if it does; dates are not read."""
    try:
        return max(0.0, float(error.response.headers.get("retry-after", "")))
    except ValueError:
        return None


def _reply(completion: ChatCompletion) -> Reply:
    """Return the first choice; raise _NoReplyError where there is none: servers send what they like, unchecked."""
    choices = getattr(completion, "choices", None)
    first = choices[0] if isinstance(choices, list) and choices else None
    content = getattr(getattr(first, "message", None), "content", 0)
    if not isinstance(content, str | None):
        raise _NoReplyError("the reply is no chat completion: it has no choice with a message of text")
    usage = getattr(completion, "usage", None)
    counts = [getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")]
    return Reply(
        content or "",
        *(count if isinstance(count, int) else 0 for count in counts),
        finish_reason=str(getattr(first, "finish_reason", None) or ""),
    )
