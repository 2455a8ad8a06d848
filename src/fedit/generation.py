"""Text from the stacked model: prompts of several adapters are continued together, at once or bit by bit."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from fedit.interfaces import ConfigError
from fedit.model import StackedModel

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True, slots=True)
class Sampling:
    """How the next token is chosen: the likeliest, or drawn."""

    temperature: float = 0.0
    """0: the likeliest (greedy). Else logits are divided by it, and the token is drawn."""
    top_p: float = 1.0
    """Draw from the fewest tokens that together have this probability (nucleus sampling, 1904.09751)."""
    seed: int | None = None
    """Of the draws; None: others every time. Rows of one call share the draws' stream."""

    def __post_init__(self) -> None:
        # Logits that are divided by less overflow.
        if self.temperature != 0 and not 0.001 <= self.temperature <= 10:
            raise ConfigError(f"temperature = {self.temperature}: expected 0 (greedy), or a number from 0.001 to 10.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p = {self.top_p}: expected a number above 0, up to 1 (all tokens).")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:  # as torch
            raise ConfigError(f"seed = {self.seed}: expected a whole number from -2^63 to 2^64 - 1.")

    def options(self) -> dict[str, Any]:
        """Return what transformers' `generate` is told."""
        if self.temperature == 0:
            return {"do_sample": False}
        # It refuses a whole number, and top_k has a default of 50 there.
        return {"do_sample": True, "temperature": float(self.temperature), "top_p": self.top_p, "top_k": 0}


GREEDY = Sampling()
UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What bytes that are no whole character are decoded to"""


def generate(
    model: StackedModel,
    prompts: Sequence[np.ndarray],
    slots: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    stops: Sequence[str] = (),
) -> list[str]:
    """Return the continuation of each prompt (int32 ids) under its row's slot.

    It ends at EOS, after `max_new_tokens`, before the first of `stops` that it comes to, or where the longest prompt of
    the batch reaches the model's context: no prompt without room for `max_new_tokens` should share a batch with shorter
    ones.
    """
    said = _Said(model.tokenizer, max(len(prompt) for prompt in prompts), stops) if stops else None
    tokens = _continue(model, prompts, slots, max_new_tokens, sampling, criterion=said)
    texts = model.tokenizer.batch_decode(tokens, skip_special_tokens=True)
    for stop in stops:
        texts = [text.partition(stop)[0] for text in texts]
    return texts


@dataclass(frozen=True, slots=True)
class Continuation:
    """What follows a prompt, so far."""

    text: str = ""
    num_tokens: int = 0
    """The end-of-sequence token counts."""
    is_finished: bool = False
    """Whether that token came"""
    whole: str = ""
    """The text, with what may be the first bytes of a character"""


def stream(
    model: StackedModel,
    prompts: Sequence[np.ndarray],
    slots: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    is_unwanted: Callable[[int], bool] = lambda row: False,
) -> Generator[list[Continuation]]:
    """Yield the continuations so far, after each token; the last texts are those of `generate`.

    A character whose bytes are not complete is left out until they are. Closing the iterator ends the work; a row that
    `is_unwanted` (asked by another thread) ends before the others.
    """
    tokens: queue.SimpleQueue[list[int] | None] = queue.SimpleQueue()
    stopped = threading.Event()
    criterion = _Unwanted(lambda row: stopped.is_set() or is_unwanted(row))

    def work() -> None:
        try:
            _continue(model, prompts, slots, max_new_tokens, sampling, _Tokens(tokens), criterion)
        finally:
            tokens.put(None)

    eos = model.tokenizer.eos_token_id
    rows: list[list[int]] = [[] for _ in prompts]
    so_far = [Continuation() for _ in prompts]
    with ThreadPoolExecutor(1) as pool:
        finished = pool.submit(work)
        try:
            while (step := tokens.get()) is not None:
                for row, token, before in zip(rows, step, so_far, strict=True):
                    if not before.is_finished:
                        row.append(token)
                so_far = [
                    _continuation(before, text, row, row[-1] == eos)
                    for before, text, row in zip(so_far, _texts(model, rows), rows, strict=True)
                ]
                yield so_far
            finished.result()
            if any(row.text != row.whole for row in so_far):
                yield [replace(row, text=row.whole) for row in so_far]
        finally:
            stopped.set()


def _continuation(before: Continuation, text: str, row: Sequence[int], is_finished: bool) -> Continuation:
    is_open = text.endswith(UNFINISHED) and not is_finished
    return Continuation(before.text if is_open else text, len(row), is_finished, text)


def _texts(model: StackedModel, rows: list[list[int]]) -> list[str]:
    return model.tokenizer.batch_decode(rows, skip_special_tokens=True)


@torch.inference_mode()
def _continue(
    model: StackedModel,
    prompts: Sequence[np.ndarray],
    slots: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    streamer: BaseStreamer | None = None,
    criterion: StoppingCriteria | None = None,
) -> Tensor:
    """Return the ids that follow each prompt, int64 [prompts, T]."""
    length = max(len(prompt) for prompt in prompts)
    input_ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, length - len(prompt) :] = torch.from_numpy(prompt.astype(np.int64))
        attention_mask[row, length - len(prompt) :] = 1
    model.route(slots)
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        if sampling.temperature and sampling.seed is None:
            torch.seed()
        elif sampling.seed is not None:
            torch.manual_seed(sampling.seed)
        output = model.base.generate(  # pyright: ignore[reportCallIssue] (torch's __getattr__ hides the mixin)
            input_ids=input_ids.to(model.device),
            attention_mask=attention_mask.to(model.device),
            max_new_tokens=max(1, int(min(max_new_tokens, model.room(length)))),
            streamer=streamer,
            stopping_criteria=None if criterion is None else StoppingCriteriaList([criterion]),
            **sampling.options(),
        )
    return output[:, length:]


class _Tokens(BaseStreamer):
    """Puts the tokens of all rows into a queue, step by step."""

    def __init__(self, tokens: queue.SimpleQueue[Any]) -> None:
        self._tokens = tokens
        self._has_prompt = False

    def put(self, value: Tensor) -> None:
        if self._has_prompt:
            self._tokens.put(value.tolist())
        self._has_prompt = True

    def end(self) -> None:
        """Nothing is left to say: the queue's end is put when `generate` has returned."""


class _Unwanted(StoppingCriteria):
    """Ends the rows that nobody reads any more."""

    def __init__(self, is_unwanted: Callable[[int], bool]) -> None:
        self._is_unwanted = is_unwanted

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        unwanted = [self._is_unwanted(row) for row in range(len(input_ids))]
        return torch.tensor(unwanted, dtype=torch.bool, device=input_ids.device)


class _Said(StoppingCriteria):
    """Ends a row once its text, special tokens included, holds one of the stops."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, length: int, stops: Sequence[str]) -> None:
        self._tokenizer = tokenizer
        self._length = length
        self._stops = stops
        # A token may be as short as a byte of a stop; what ends one may begin with other text.
        self._window = max(len(stop.encode()) for stop in stops) + 1

    def __call__(self, input_ids: Any, scores: Any, **options: Any) -> Any:
        texts = self._tokenizer.batch_decode(input_ids[:, self._length :][:, -self._window :])
        ended = [any(stop in text for stop in self._stops) for text in texts]
        return torch.tensor(ended, device=input_ids.device)
