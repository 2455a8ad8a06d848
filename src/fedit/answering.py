"""Questions that wait are answered together, whichever model they ask: one pass through the base serves all of them."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fedit.evaluation.heldout import GENERATED_TOKENS
from fedit.generation import Continuation, Sampling
from fedit.interfaces import EngineError
from fedit.run_models import RunModels

if TYPE_CHECKING:
    import numpy as np

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer so far."""

    text: str
    num_tokens: int
    finish_reason: str | None = None
    """``stop``: it ended by itself, or before a stop string; ``length``: it is cut; None: it grows"""


@dataclass(eq=False)
class Question:
    """What is asked of a model."""

    model: str
    prompt: np.ndarray
    """int32 [T]"""
    max_new_tokens: int
    sampling: Sampling
    stop: Sequence[str] = ()
    """Strings that end the answer, and are no part of it"""
    tell: Callable[[Answer | EngineError], object] = field(default=lambda answer: None)
    """Called with the answer as it grows, by another thread"""
    is_over: bool = False
    """Whether it has its answer, or nobody waits for it any more"""

    def read(self, continuation: Continuation, is_last: bool = False) -> None:
        """Tell what the model said, up to a stop string."""
        if self.is_over:
            return
        is_last = is_last or continuation.is_finished or continuation.num_tokens >= self.max_new_tokens
        said = continuation.whole if is_last else continuation.text
        text, is_stopped = before_stop(said, self.stop)
        if is_last and not is_stopped:
            text = said  # its end will not become a stop string any more
        reason = "stop" if is_stopped or continuation.is_finished else "length" if is_last else None
        self.is_over = reason is not None
        self.tell(Answer(text, continuation.num_tokens, reason))


class Answering:
    """Answers questions one batch after the other, in a thread of its own."""

    def __init__(self, models: RunModels) -> None:
        self._models = models
        self._waiting: queue.SimpleQueue[Question | None] = queue.SimpleQueue()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    async def answers(self, question: Question) -> AsyncGenerator[Answer]:
        """Yield the answer as it grows. Closing the iterator ends the work on it.

        Raises:
            EngineError: it could not be given.
        """
        loop = asyncio.get_running_loop()
        arrived: asyncio.Queue[Answer | EngineError] = asyncio.Queue()
        question.tell = lambda answer: loop.call_soon_threadsafe(arrived.put_nowait, answer)
        self._waiting.put(question)
        try:
            while True:
                answer = await arrived.get()
                if isinstance(answer, EngineError):
                    raise answer
                yield answer
                if answer.finish_reason is not None:
                    return
        finally:
            question.is_over = True

    def close(self) -> None:
        """End the work."""
        self._is_closed = True
        self._waiting.put(None)
        self._thread.join()

    def _work(self) -> None:
        waiting: list[Question] = []
        while not self._is_closed:
            arrived = [] if waiting else [self._waiting.get()]
            while not self._waiting.empty():
                arrived.append(self._waiting.get())
            waiting = [question for question in [*waiting, *arrived] if question is not None and not question.is_over]
            if waiting:
                batch = self._together(waiting)
                waiting = [question for question in waiting if question not in batch]
                self._answer(batch)

    def _together(self, waiting: Sequence[Question]) -> list[Question]:
        """Return the first question, and those that can share its batch: none is drawn by a seed of its own, none has
        its answer cut by the context because another's prompt is longer.
        """
        first, *others = waiting
        batch = [first]
        model = self._models.model
        limit = GENERATED_TOKENS.get(model.device.type, GENERATED_TOKENS["cuda"])
        if first.sampling.temperature and first.sampling.seed is not None:
            return batch
        for other in others:
            rows = [*batch, other]
            length, new = max(len(row.prompt) for row in rows), max(row.max_new_tokens for row in rows)
            fits = new <= model.room(length) and len(rows) * (length + new) <= limit
            if other.sampling == first.sampling and fits:
                batch.append(other)
        return batch

    def _answer(self, batch: Sequence[Question]) -> None:
        asked = [(question.model, question.prompt) for question in batch]
        most = max(question.max_new_tokens for question in batch)
        is_unwanted = lambda row: batch[row].is_over or self._is_closed
        continued = [Continuation() for _ in batch]
        try:
            self._models = self._models.with_models([question.model for question in batch])
            for continued in self._models.stream(asked, most, batch[0].sampling, is_unwanted):
                for question, continuation in zip(batch, continued, strict=True):
                    question.read(continuation)
        except Exception as error:  # noqa: BLE001 (whatever it is, those who asked are told)
            _log.error("No answer", exc_info=error)
            for question in batch:
                question.tell(EngineError(f"{type(error).__name__}: {error}"))
            return
        for question, continuation in zip(batch, continued, strict=True):
            question.read(continuation, is_last=True)


def before_stop(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """Return the text before the first stop string, and whether there is one; else what cannot be the start of one."""
    found = [at for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)], True
    longest = max((len(stop) for stop in stops), default=0)
    for start in range(max(0, len(text) - longest + 1), len(text)):
        if any(stop.startswith(text[start:]) for stop in stops):
            return text[:start], False
    return text, False
