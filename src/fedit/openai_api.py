"""The objects of OpenAI's API: what is asked, and how answers are told."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, StringConstraints, field_validator, model_validator

from fedit.answering import Answer
from fedit.generation import GREEDY, Sampling
from fedit.interfaces import DataError, EngineError, Example, Turn

Stop = Annotated[str, StringConstraints(min_length=1)]


class StreamOptions(BaseModel):
    """What a streamed answer ends with."""

    include_usage: bool = False


class AskedOf(BaseModel, extra="forbid"):
    """What chats and completions have in common. Nothing that would change the answer is left out silently."""

    NEUTRAL: ClassVar[dict[str, Any]] = {
        "n": 1, "best_of": 1, "echo": False, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False,
        "top_logprobs": 0, "logit_bias": {}, "response_format": {"type": "text"}, "tools": [], "suffix": "",
    }  # fmt: skip
    """Settings that are understood at the value that changes nothing"""
    WITHOUT_MEANING: ClassVar[set[str]] = {"user", "metadata", "store", "safety_identifier", "prompt_cache_key"}

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop: list[Stop] = Field([], max_length=4)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_neutral(cls, asked: Any) -> Any:
        if not isinstance(asked, dict):
            return asked
        return {
            name: value
            for name, value in asked.items()
            if value is not None
            and name not in cls.WITHOUT_MEANING
            and not (name in cls.NEUTRAL and _is_same(value, cls.NEUTRAL[name]))
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _listed(cls, stop: Any) -> Any:
        return [stop] if isinstance(stop, str) else stop

    @property
    def sampling(self) -> Sampling:
        """Raises ConfigError where it is impossible."""
        sampling = Sampling(self.temperature, self.top_p, self.seed)
        return sampling if self.temperature else GREEDY

    @property
    def most(self) -> int | None:
        """Tokens of the answer at most, if the request says it."""
        return self.max_tokens


def _is_same(value: Any, neutral: Any) -> bool:
    """Tell whether both are equal; 0 and false are not: ``logprobs`` = 0 asks for something."""
    return value == neutral and isinstance(value, bool) == isinstance(neutral, bool)


class Part(BaseModel, extra="forbid"):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel, extra="forbid"):
    """What somebody says in a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    context: str = ""
    """Of a user's message: the text that it is about, for templates that render it apart; not of OpenAI's API"""
    name: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_unset(cls, message: Any) -> Any:
        """OpenAI's client sends an answer back with all that it did not have, such as ``"refusal": null``."""
        if not isinstance(message, dict):
            return message
        return {name: value for name, value in message.items() if value is not None}

    @field_validator("content", mode="before")
    @classmethod
    def _joined(cls, content: Any) -> Any:
        if isinstance(content, list):
            return "".join(Part.model_validate(part).text for part in content)
        return content


class AskedChat(AskedOf):
    """The body of ``/v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    @property
    def most(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    def conversation(self) -> Example:
        """Return the messages as turns, the last of which is to be answered.

        Raises:
            DataError: they are not an optional system message, then a user's and the assistant's in turn.
        """
        has_system = self.messages[0].role in {"system", "developer"}
        system, rest = self.messages[0].content if has_system else "", self.messages[has_system:]
        roles = [message.role for message in rest]
        if len(rest) % 2 == 0 or roles != (["user", "assistant"] * len(rest))[: len(rest)]:
            raise DataError(
                "messages: expected a system message or none, then a user's and the assistant's in turn, the last one "
                f"a user's; got {', '.join(message.role for message in self.messages)}."
            )
        answers = [message.content for message in rest[1::2]] + [""]
        turns = [Turn(asked.content, answer, asked.context) for asked, answer in zip(rest[::2], answers, strict=True)]
        return Example(tuple(turns), system=system)


class AskedCompletion(AskedOf):
    """The body of ``/v1/completions``."""

    prompt: str


class Reply:
    """The objects in which an answer is told."""

    def __init__(self, asked: AskedOf, num_prompt_tokens: int) -> None:
        self._is_chat = isinstance(asked, AskedChat)
        self._with_usage = asked.stream_options.include_usage
        self._num_prompt_tokens = num_prompt_tokens
        self._about = {
            "id": f"{'chatcmpl' if self._is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": asked.model,
        }

    def whole(self, answer: Answer) -> dict[str, Any]:
        """Return the object of an answer that is not streamed."""
        text = self._shown(answer.text)
        said = {"message": {"role": "assistant", "content": text}} if self._is_chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": answer.finish_reason}
        kind = "chat.completion" if self._is_chat else "text_completion"
        return {**self._about, "object": kind, "choices": [choice], "usage": self._usage(answer)}

    async def events(self, answers: AsyncGenerator[Answer]) -> AsyncGenerator[str]:
        """Yield the server-sent events of a streamed answer."""
        shown = ""
        if self._is_chat:
            yield self._event([self._choice({"role": "assistant", "content": ""})])
        async with aclosing(answers):
            try:
                async for answer in answers:
                    text = self._shown(answer.text)
                    if text != shown or answer.finish_reason is not None:
                        said = {"content": text[len(shown) :]} if self._is_chat else text[len(shown) :]
                        yield self._event([self._choice(said, answer.finish_reason)])
                        shown = text
                    if answer.finish_reason is not None and self._with_usage:
                        yield self._event([], usage=self._usage(answer))
            except EngineError as error:
                yield f"data: {json.dumps(error_object(str(error), 'server_error'))}\n\n"
        yield "data: [DONE]\n\n"

    def _shown(self, text: str) -> str:
        return text.strip() if self._is_chat else text

    def _choice(self, said: dict[str, str] | str, finish_reason: str | None = None) -> dict[str, Any]:
        return {
            "index": 0,
            "delta" if self._is_chat else "text": said,
            "logprobs": None,
            "finish_reason": finish_reason,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        kind = "chat.completion.chunk" if self._is_chat else "text_completion"
        return f"data: {json.dumps({**self._about, 'object': kind, 'choices': choices, **more})}\n\n"

    def _usage(self, answer: Answer) -> dict[str, int]:
        prompt, completion = self._num_prompt_tokens, answer.num_tokens
        return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def error_object(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """Return the object that says what went wrong."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}
