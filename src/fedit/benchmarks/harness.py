"""The models of a run as lm-eval asks them: one after the other, each the same requests."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from fedit.benchmarks.answers import Request, continuations, likelihoods
from fedit.benchmarks.rows import split_context
from fedit.data import encode_prompt
from fedit.generation import GREEDY, Sampling
from fedit.interfaces import ConfigError, Example, Turn
from fedit.run_models import RunModels

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance

DEFAULT_NEW_TOKENS = 256
"""Of a task that says nothing, as in lm-eval"""
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
"""What tasks call the tokens of an answer at most; the first counts"""

Answer = TypeVar("Answer")


class HarnessModel(LM):
    """All of a run's models to lm-eval, which sees the one called `name`.

    When the first of them is asked, all answer, together; what the others said waits until they are asked the same.

    A prompt of the run's template (`apply_chat_template`) is tokenised as in training: segment by segment, an
    end-of-sequence token after each earlier response, and the continuation by itself. Any other text is tokenised as
    lm-eval's own models do: with what the tokenizer puts in front, context and continuation in one piece.
    """

    def __init__(self, models: RunModels) -> None:
        super().__init__()
        self.names = list(models.adapters)
        self.name = self.names[0]
        self._models = models
        self._template = models.config.data.template
        self._prompts: dict[str, np.ndarray] = {}
        """By text, the ids of a prompt in the run's template"""
        self._answers: dict[str, tuple[list[Any], Mapping[str, Any]]] = {}

    @property
    def tokenizer_name(self) -> str:
        return f"fedit-{self._template.name}"

    # -- requests

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        pairs = [request.arguments for request in requests]
        return self._recall("loglikelihood", pairs, lambda: likelihoods(self._models, [self._pair(*p) for p in pairs]))

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        texts = [request.arguments[0] for request in requests]

        def ask() -> dict[str, list[float]]:
            windows = [self._windows(text) for text in texts]
            found = likelihoods(self._models, [window for own in windows for window in own])
            ends = np.cumsum([len(own) for own in windows])[:-1]
            return {
                name: [float(own.sum()) for own in np.split(np.array([value for value, _ in values]), ends)]
                for name, values in found.items()
            }

        return self._recall("loglikelihood_rolling", texts, ask)

    def generate_until(self, requests: list[Instance]) -> list[str]:
        asked = [request.arguments for request in requests]

        def ask() -> dict[str, list[str]]:
            alike: dict[str, list[int]] = {}
            for index, (_, options) in enumerate(asked):
                alike.setdefault(json.dumps(options, sort_keys=True), []).append(index)
            texts = {name: [""] * len(asked) for name in self._models.adapters}
            for options, indices in alike.items():
                settings = GenerationSettings.of(json.loads(options), self._models.config.seed)
                prompts = [self._prompt(asked[index][0]) for index in indices]
                said = continuations(self._models, prompts, settings.max_new_tokens, settings.sampling, settings.stops)
                for name, own in said.items():
                    for index, text in zip(indices, own, strict=True):
                        texts[name][index] = text
            return texts

        return self._recall("generate_until", asked, ask)

    def _recall(self, kind: str, asked: list[Any], ask: Callable[[], Mapping[str, list[Answer]]]) -> list[Answer]:
        """Return what this model answered when another was asked the same, or ask all of them."""
        if kind not in self._answers or self._answers[kind][0] != asked:
            self._answers[kind] = asked, ask()
        return self._answers[kind][1][self.name]

    # -- text

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a chat in the run's template, and remember its ids; a last message of the assistant begins the answer.

        Raises:
            DataError: the template refuses the chat.
        """
        example, beginning = _as_example(chat_history)
        tokenizer = self._models.model.tokenizer
        segments = self._template.render(example, tokenizer)[:-1]
        text = "".join(segment.text for segment in segments) + beginning
        ids = encode_prompt(example, self._template, tokenizer)
        self._prompts[text] = np.concatenate([ids, self._answer_ids(beginning)])
        return text

    def _prompt(self, text: str) -> np.ndarray:
        known = self._prompts.get(text)
        return self._ids(text) if known is None else known

    def _pair(self, context: str, continuation: str) -> Request:
        if context in self._prompts:
            return self._prompts[context], self._answer_ids(continuation)
        stripped = context.rstrip()
        first = self._first_id
        if not stripped:
            after = self._ids(context + continuation, special=False)
            return (after[:1], after[1:]) if len(after) and after[0] == first else (_array([first]), after)
        before = self._ids(stripped)
        return before, self._ids(context + continuation)[len(before) :]

    def _windows(self, text: str) -> list[Request]:
        """Return pieces of the context's length, each of which begins with the last token of the one before."""
        ids = self._ids(text)
        context = self._models.model.room(0)
        length = int(min(context, len(ids)))
        windows = get_rolling_token_windows(ids.tolist(), self._first_id, length, 1) if length else ()
        return [(_array(before), _array(after)) for before, after in map(make_disjoint_window, windows)]

    @property
    def _first_id(self) -> int:
        """The token that text without a context follows: BOS, or EOS where there is none."""
        tokenizer = self._models.model.tokenizer
        return cast("int", tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id)

    def _ids(self, text: str, *, special: bool | None = None) -> np.ndarray:
        """Return the ids of text; of text that spells BOS already, without another in front."""
        tokenizer = self._models.model.tokenizer
        if special is None:
            special = not text.startswith(cast("str", tokenizer.decode([self._first_id])))
        return _array(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])

    def _answer_ids(self, text: str) -> np.ndarray:
        split = not self._template.special_tokens
        tokenizer = self._models.model.tokenizer
        return _array(tokenizer(text, add_special_tokens=False, split_special_tokens=split)["input_ids"])


@dataclass(frozen=True)
class GenerationSettings:
    """How a task wants text generated."""

    max_new_tokens: int
    sampling: Sampling
    stops: Sequence[str]

    @classmethod
    def of(cls, options: Mapping[str, Any], seed: int) -> GenerationSettings:
        """Read a task's ``generation_kwargs``.

        Raises:
            ConfigError: it asks for something that is not known here.
        """
        known = {"until", "do_sample", "temperature", "top_p", "num_beams", *_LENGTHS}
        if (unknown := options.keys() - known) or options.get("num_beams", 1) != 1:
            raise ConfigError(
                f"generation_kwargs: {', '.join(sorted(unknown or {'num_beams'}))} cannot be followed here. Known: "
                f"{', '.join(sorted(known - {'num_beams'}))}. Leave the task out, or write it again without."
            )
        length = next((options[key] for key in _LENGTHS if options.get(key) is not None), DEFAULT_NEW_TOKENS)
        temperature = options.get("temperature")
        sampled = options.get("do_sample", bool(temperature))
        sampling = Sampling(1.0 if temperature is None else temperature, options.get("top_p") or 1.0, seed % 2**63)
        until = options.get("until") or []
        stops = [stop for stop in ([until] if isinstance(until, str) else until) if stop]
        return cls(int(length), sampling if sampled else GREEDY, stops)


def _as_example(chat: Sequence[Mapping[str, str]]) -> tuple[Example, str]:
    """Return a chat as an example whose last response is empty, and how that response is to begin."""
    messages = [(message["role"], message["content"]) for message in chat]
    system = messages.pop(0)[1] if messages[0][0] == "system" else ""
    beginning = messages.pop()[1] if messages[-1][0] == "assistant" else ""
    texts = [*(content for _, content in messages), ""]
    turns = []
    for asked, answered in zip(texts[::2], texts[1::2], strict=True):
        instruction, context = split_context(asked)
        turns.append(Turn(instruction, answered, context))
    return Example(tuple(turns), system=system), beginning


def _array(ids: Sequence[int]) -> np.ndarray:
    return np.array(ids, dtype=np.int32)
