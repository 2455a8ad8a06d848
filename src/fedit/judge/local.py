r"""A judge without a server: a transformers model on this machine, which writes a review or whose expectation is taken.

``generation`` is the protocol as it is: the model writes its reply greedily, and the reply is read as any other.

``likelihood`` asks for no words. The reply that the prompt asks for begins with its scores, so every way to begin it,
``"s t\n"`` with s and t from 1 to 10 (of single grading ``"Rating: [[s]]"``), has a likelihood under the model; the
scores are the expectations of s and t over these beginnings, normalised. That always gives scores and costs less than a
written review, so that small models can judge at all. It is not what a written review would say: there is no reasoning
before a grade, scores are drawn to the middle (a model that prefers nothing gives 5.5), so ratios are drawn to 1.
"""

from __future__ import annotations

import copy
import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jinja2 import TemplateError

from fedit.base import load_base, load_tokenizer, resolve_device
from fedit.config import ModelConfig
from fedit.interfaces import EngineError
from fedit.judge.protocol import HIGHEST, PAIRWISE, Messages
from fedit.judge.replies import Reply, Request

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Method = Literal["generation", "likelihood"]
BATCH_TOKENS = {"cpu": 8192, "cuda": 65536}
"""Prompt and reply tokens of a batch of written reviews, at most"""
DEFAULT_TOKENS = 512


@dataclass(frozen=True)
class LocalJudge:
    """A causal language model from a folder or the Hub."""

    model: str
    method: Method
    protocol: str
    max_tokens: int = DEFAULT_TOKENS
    """Of a written review"""
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"

    @property
    def where(self) -> str:
        return f"this machine, by {self.method}"

    @property
    def parameters(self) -> Mapping[str, Any]:
        """What the reply depends on, beside the model and the messages; of a folder, which other weights may come into,
        a digest of its files' names, sizes and times.
        """
        limits = {"max_tokens": self.max_tokens} if self.method == "generation" else {}
        return {"local": self.method, **limits, **self._files}

    @cached_property
    def _files(self) -> Mapping[str, str]:
        place = Path(self.model)
        if not place.is_dir():
            return {}
        stats = [(file.name, file.stat()) for file in sorted(place.iterdir()) if file.is_file()]
        listed = [(name, stat.st_size, stat.st_mtime_ns) for name, stat in stats]
        return {"files": hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]}

    @property
    def most_tokens(self) -> int:
        """Of a reply."""
        return self.max_tokens if self.method == "generation" else 0

    def check(self) -> None:
        """Raise EngineError where the model cannot be found."""
        try:
            load_tokenizer(self.model)
        except EngineError as error:
            raise EngineError(str(error).replace("[model] path = ", "--judge ")) from error

    def ask(
        self, requests: Sequence[Request], on_reply: Callable[[Request, Reply | str], None], num_answered: int = 0
    ) -> None:
        """Call `on_reply` with each request and its reply, or why there is none, as they come.

        Raises:
            EngineError: the model cannot be loaded.
        """
        if not requests:
            return
        asked = list[tuple[Request, list[int]]]()
        for request in requests:
            ids = self._prompt(request.messages)
            if (room := self._context - len(ids)) < self._needed:
                on_reply(
                    request,
                    f"the prompt has {len(ids)} tokens, which leaves {max(0, room)} of the model's context; "
                    f"{self._needed} are needed (--max-tokens)",
                )
            else:
                asked.append((request, ids))
        ask = self._write if self.method == "generation" else self._weigh
        with torch.inference_mode():
            for request, reply in ask(asked):
                on_reply(request, reply)

    # ------------------------------------------------------------------------------------------------ the two ways

    def _write(self, asked: Sequence[tuple[Request, list[int]]]) -> Iterator[tuple[Request, Reply]]:
        """Yield greedy replies, the longest prompts first, so many together as fit `BATCH_TOKENS`."""
        waiting = sorted(asked, key=lambda pair: len(pair[1]))
        limit = BATCH_TOKENS.get(self._base.device.type, BATCH_TOKENS["cuda"])
        while waiting:
            longest = len(waiting[-1][1])
            count = max(1, limit // (longest + self.max_tokens))
            batch, waiting = waiting[-count:], waiting[:-count]
            ids = torch.tensor([[0] * (longest - len(own)) + own for _, own in batch], device=self._base.device)
            mask = torch.tensor([[0] * (longest - len(own)) + [1] * len(own) for _, own in batch], device=ids.device)
            output = self._base.generate(  # pyright: ignore[reportCallIssue] (torch's __getattr__ hides the mixin)
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=self.max_tokens,
                do_sample=False,
            )
            said = output[:, longest:]
            end = self._base.generation_config.eos_token_id
            ends = torch.tensor([] if end is None else end, dtype=said.dtype, device=said.device)
            is_cut = (~torch.isin(said, ends).any(dim=1)).tolist()
            texts = self._tokenizer.batch_decode(said, skip_special_tokens=True)
            for (request, own), text, cut in zip(batch, texts, is_cut, strict=True):
                yield request, Reply(text.strip(), len(own), len(self._ids(text)), "length" if cut else "stop")

    def _weigh(self, asked: Sequence[tuple[Request, list[int]]]) -> Iterator[tuple[Request, Reply]]:
        """Yield replies that hold expected scores."""
        form = "{:.4f} {:.4f}" if self.protocol == PAIRWISE else "[[{:.4f}]]"
        for request, ids in asked:
            log_likelihoods = torch.tensor(self._log_likelihoods(ids), dtype=torch.float64)
            expected = torch.softmax(log_likelihoods, 0).numpy() @ np.array([scores for scores, _ in self._beginnings])
            yield request, Reply(form.format(*expected), len(ids))

    def _log_likelihoods(self, prompt: list[int]) -> list[float]:
        """Return the log-likelihood of each beginning after the prompt, whose keys and values are computed once."""
        device = self._base.device
        output = self._base(torch.tensor([prompt], device=device), use_cache=True, logits_to_keep=1)
        found = []
        for start in range(0, len(self._beginnings), HIGHEST):
            rows = [ids for _, ids in self._beginnings[start : start + HIGHEST]]
            longest = max(map(len, rows))
            padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
            cache = copy.deepcopy(output.past_key_values)
            cache.batch_repeat_interleave(len(rows))
            # The padding stands behind: nothing that counts sees it.
            logits = self._base(padded, past_key_values=cache, use_cache=True).logits
            before = torch.cat([output.logits.expand(len(rows), -1, -1), logits[:, :-1]], dim=1).double()
            own = torch.log_softmax(before, dim=-1).gather(2, padded[:, :, None])[:, :, 0]
            found += [float(own[row, : len(ids)].sum()) for row, ids in enumerate(rows)]
        return found

    # ----------------------------------------------------------------------------------------------------- the model

    @cached_property
    def _base(self) -> PreTrainedModel:
        return load_base(ModelConfig(path=self.model, dtype=self.dtype), resolve_device(self.device))

    @cached_property
    def _tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model)

    @property
    def _context(self) -> int:
        return getattr(self._base.config, "max_position_embeddings", None) or 1 << 30

    @property
    def _needed(self) -> int:
        """Return the tokens that a reply may have."""
        return self.max_tokens if self.method == "generation" else max(len(ids) for _, ids in self._beginnings)

    @cached_property
    def _beginnings(self) -> list[tuple[tuple[int, ...], list[int]]]:
        """Return the scores that a reply can begin with, and the tokens of that beginning."""
        each = range(1, HIGHEST + 1)
        if self.protocol == PAIRWISE:
            return [((s, t), self._ids(f"{s} {t}\n")) for s, t in itertools.product(each, each)]
        return [((s,), self._ids(f"Rating: [[{s}]]")) for s in each]

    def _ids(self, text: str, *, special: bool = False) -> list[int]:
        return self._tokenizer(text, add_special_tokens=special).input_ids

    def _prompt(self, messages: Messages) -> list[int]:
        """Return the ids that ask for the reply: by the model's chat template or, without one, as plain text."""
        if not self._tokenizer.chat_template:
            return self._ids("\n\n".join([*(message["content"] for message in messages), ""]), special=True)
        try:
            text = self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise EngineError(f"{self.model}: its chat template refuses the judge's prompt: {error}.") from error
        return self._ids(str(text))
