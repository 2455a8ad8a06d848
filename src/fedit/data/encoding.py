"""Examples -> token ids with the supervised positions marked.

Each segment is tokenised by itself, so that the prompt's ids are those that generation starts from and the response's
are those that it can produce; tokenising the whole text could merge characters across the border. An end-of-sequence
token follows every response and is supervised: without it a model never learns to stop.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from fedit.config import DataConfig
from fedit.interfaces import DataError, EncodedExample, Example, Segment, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_BATCH_SIZE = 2048
"""Rows tokenised in one call: enough to keep the tokenizer's threads busy, few enough to hold their texts."""

TOO_LONG = "longer than max_length even without the end of its context"
NO_RESPONSE_TOKENS = "the tokenizer makes no token of the response"
SPECIAL_TOKEN_TEXT = "its text spells a special token, which the chat template would turn into the token"


@dataclass(frozen=True, slots=True)
class Dropped:
    """A row that cannot be trained on; a value, counted in the report."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class EncodingReport:
    """What became of the rows."""

    rows: int
    """Encoded rows, those with a shortened context included."""
    tokens: int
    supervised_tokens: int
    truncated: int
    """Rows that lost the end of their context to fit max_length."""
    too_long: int
    """Rows left out because shortening their context was not enough, or they have none."""
    all_masked: int
    """Rows left out because their response tokenises to nothing."""
    special_token_text: int
    """Rows left out because their text spells a special token in a template that carries special tokens."""
    dropped_sources: tuple[str, ...]
    """The first few rows left out, each with the reason."""

    @property
    def dropped(self) -> int:
        return self.too_long + self.all_masked + self.special_token_text


@dataclass(frozen=True, slots=True)
class _Encoded:
    result: EncodedExample | Dropped
    truncated: bool = False


def encode(
    example: Example, template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedExample | Dropped:
    """Return the ids of one example, its context shortened where it exceeds `max_length`, or why it is left out.

    Raises:
        DataError: the tokenizer has no end-of-sequence token, or the template cannot render the example.
    """
    (encoded,) = _encode_rows([example], template, tokenizer, max_length)
    return encoded.result


def encode_all(
    examples: Sequence[Example], config: DataConfig, tokenizer: PreTrainedTokenizerBase, *, pairs: bool = False
) -> tuple[list[EncodedExample], EncodingReport]:
    """Return the examples that can be trained on, in order, and a report of those that lost something.

    With `pairs`, each has its rejected response, too, encoded with the same prompt.

    Raises:
        DataError: none is left, the tokenizer has no end-of-sequence token, the template cannot render one, or a row
            lacks its rejected response.
    """
    encode_rows = _encode_pairs if pairs else _encode_rows
    encoded: list[EncodedExample] = []
    dropped: list[Dropped] = []
    truncated = 0
    for start in range(0, len(examples), _BATCH_SIZE):
        batch = examples[start : start + _BATCH_SIZE]
        for row in encode_rows(batch, config.template, tokenizer, config.max_length):
            truncated += row.truncated
            if isinstance(row.result, Dropped):
                dropped.append(row.result)
            else:
                encoded.append(row.result)
    counts = Counter(row.reason for row in dropped)
    report = EncodingReport(
        rows=len(encoded),
        tokens=sum(row.num_trained for row in encoded),
        supervised_tokens=sum(row.num_supervised for row in encoded),
        truncated=truncated,
        too_long=counts[TOO_LONG],
        all_masked=counts[NO_RESPONSE_TOKENS],
        special_token_text=counts[SPECIAL_TOKEN_TEXT],
        dropped_sources=tuple(f"{row.source}: {row.reason}" for row in dropped[:5]),
    )
    if examples and not encoded:
        raise DataError(
            f"None of the {len(examples)} rows can be trained on at [data] max_length = {config.max_length}. First: "
            f"{report.dropped_sources[0]}. Raise max_length, or use a shorter template."
        )
    if dropped:
        logger.info("%d of %d rows left out; first: %s", len(dropped), len(examples), report.dropped_sources[0])
    return encoded, report


def check_text(text: str) -> None:
    """Raise DataError for half of a surrogate pair, which no tokenizer takes: it came from bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(f"Character {error.start + 1} is no text (half of a surrogate pair). Send UTF-8.") from error


def encode_prompt(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """Return the ids (int32 [T]) of a conversation in progress: its last response is empty and to be generated.

    They equal `EncodedExample.prompt_ids` of the finished conversation. Nothing is shortened.

    Raises:
        DataError: it holds what is no text.
    """
    said = [text for turn in example.turns for text in (turn.instruction, turn.context, turn.response)]
    for text in (example.system, *said):
        check_text(text)
    unfinished = replace(example, turns=(*example.turns[:-1], replace(example.turns[-1], response="")))
    ((ids, supervised),) = _tokenise([unfinished], template, tokenizer, prompts_only=True)
    assert not supervised[-1]
    return ids


# ------------------------------------------------------------------------------------------------------------ rows


def _encode_rows(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Encoded]:
    """Encode rows in batches, again and again those that are too long, until their shortened context fits."""
    results: dict[int, _Encoded] = {}
    pending: dict[int, Example] = {}
    special_tokens = tokenizer.all_special_tokens if template.special_tokens else []
    for index, example in enumerate(examples):
        if _spells_any(special_tokens, example):
            results[index] = _Encoded(Dropped(example.source, SPECIAL_TOKEN_TEXT))
        else:
            pending[index] = example
    while pending:
        excess: dict[int, int] = {}
        rows = _tokenise(list(pending.values()), template, tokenizer)
        for (index, rendered), (ids, supervised) in zip(pending.items(), rows, strict=True):
            original = examples[index]
            if len(ids) > max_length:
                excess[index] = len(ids) - max_length
            elif supervised[-2]:
                results[index] = _Encoded(EncodedExample(ids, supervised, original), rendered is not original)
            else:
                results[index] = _Encoded(Dropped(original.source, NO_RESPONSE_TOKENS))
        shortened = _shorten([pending[index] for index in excess], list(excess.values()), tokenizer)
        pending = {}
        for index, example in zip(excess, shortened, strict=True):
            if example is None:
                results[index] = _Encoded(Dropped(examples[index].source, TOO_LONG))
            else:
                pending[index] = example
    return [results[index] for index in range(len(examples))]


def _encode_pairs(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> list[_Encoded]:
    """Encode rows with their response and with the rejected one; a pair whose prompts differ, because one of them was
    shortened more than the other, is left out.
    """
    others = []
    for example in examples:
        if example.rejected is None:
            raise DataError(
                f"{example.source}: no rejected response, which the objective trains against. Name its column: [data] "
                'columns = { rejected = "..." }.'
            )
        last = replace(example.turns[-1], response=example.rejected)
        others.append(replace(example, turns=(*example.turns[:-1], last), rejected=None, checks=None))
    results = []
    chosen_rows, rejected_rows = (_encode_rows(rows, template, tokenizer, max_length) for rows in (examples, others))
    for chosen, rejected in zip(chosen_rows, rejected_rows, strict=True):
        if isinstance(chosen.result, Dropped):
            results.append(chosen)
        elif isinstance(rejected.result, Dropped):
            results.append(rejected)
        elif np.array_equal(chosen.result.prompt_ids, rejected.result.prompt_ids):
            results.append(_Encoded(replace(chosen.result, rejected=rejected.result), chosen.truncated))
        else:
            results.append(_Encoded(Dropped(chosen.result.example.source, TOO_LONG)))
    return results


def _spells_any(tokens: Sequence[str], example: Example) -> bool:
    turns = (text for turn in example.turns for text in (turn.instruction, turn.context, turn.response))
    return bool(tokens) and any(token in text for text in (example.system, *turns) for token in tokens)


def _shorten(
    examples: Sequence[Example], excess: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> list[Example | None]:
    """Return each example with `excess` tokens cut off its longest context; None where nothing of it would be left.

    Losing the whole context is no shortening: the row would ask about a passage that it does not show.
    """
    places = [max(range(len(example.turns)), key=lambda i: len(example.turns[i].context)) for example in examples]
    contexts = [example.turns[place].context for example, place in zip(examples, places, strict=True)]
    shortened: list[Example | None] = []
    for example, place, context, starts, over in zip(
        examples, places, contexts, _token_starts(contexts, tokenizer), excess, strict=True
    ):
        # At least one character goes, or the caller would never come to an end.
        cut = min(starts[-over], len(context) - 1) if len(starts) > over else 0
        kept = context[:cut].rstrip()
        if not kept:
            shortened.append(None)
            continue
        turns = list(example.turns)
        turns[place] = replace(turns[place], context=kept)
        shortened.append(replace(example, turns=tuple(turns)))
    return shortened


def _token_starts(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Return the positions in each text at which its tokens start."""
    if not texts:
        return []
    if not tokenizer.is_fast:
        # No offsets: spread the tokens evenly over the text. The caller encodes again and cuts more if needed.
        counts = [len(ids) for ids in _ids(texts, tokenizer, special=False)]
        return [
            [position * len(text) // count for position in range(count)]
            for text, count in zip(texts, counts, strict=True)
        ]
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=True,
        return_offsets_mapping=True,
        return_attention_mask=False,
        verbose=False,
    )
    return [[start for start, _ in offsets] for offsets in encoding["offset_mapping"]]


# ---------------------------------------------------------------------------------------------------------- tokens


def _tokenise(
    examples: Sequence[Example], template: Template, tokenizer: PreTrainedTokenizerBase, prompts_only: bool = False
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return ids (int32 [T]) and supervised positions (bool [T]) of each example, of any length."""
    eos = tokenizer.eos_token_id
    if not isinstance(eos, int):
        raise DataError(
            "The tokenizer has no end-of-sequence token, so the model could not learn to stop. Set eos_token in its "
            "tokenizer_config.json to the token that ends a text."
        )
    rendered = [_render(example, template, tokenizer) for example in examples]
    if prompts_only:
        rendered = [segments[:-1] for segments in rendered]
    texts = [segment.text for segments in rendered for segment in segments]
    ids = iter(_ids(texts, tokenizer, special=template.special_tokens))
    before = [] if template.special_tokens else ids_before_text(tokenizer)
    joined = [_join(segments, ids, before, eos) for segments in rendered]
    for example, (_, supervised) in zip(examples, joined, strict=True):
        if not len(supervised) or supervised[0]:
            raise DataError(
                f"{example.source or 'row'}: the tokenizer makes no token of the prompt that template "
                f"{template.name!r} renders, so there is nothing to predict the response from."
            )
    return joined


def _render(example: Example, template: Template, tokenizer: PreTrainedTokenizerBase) -> list[Segment]:
    segments = template.render(example, tokenizer)
    if len(segments) < 2 or not segments[-1].supervised or segments[-2].supervised:
        raise DataError(
            f"{example.source or 'row'}: template {template.name!r} must render a prompt segment and then the "
            f"response as its last segment, got supervised = {[segment.supervised for segment in segments]}."
        )
    return segments


def _join(
    segments: Sequence[Segment], ids: Iterator[list[int]], before: Sequence[int], eos: int
) -> tuple[np.ndarray, np.ndarray]:
    joined = list(before)
    supervised = [False] * len(joined)
    for segment in segments:
        tokens = next(ids)
        learned = 0
        if segment.supervised:
            if eos in tokens:
                # A chat template wrote the end of turn; what it puts after that is not the model's to say.
                learned = len(tokens) - tokens[::-1].index(eos)
            else:
                tokens = [*tokens, eos]
                learned = len(tokens)
        joined += tokens
        supervised += [True] * learned + [False] * (len(tokens) - learned)
    if segments[-1].supervised:
        end = len(supervised) - supervised[::-1].index(True)
        joined, supervised = joined[:end], supervised[:end]
    return np.array(joined, dtype=np.int32), np.array(supervised, dtype=bool)


def _ids(texts: Sequence[str], tokenizer: PreTrainedTokenizerBase, special: bool) -> list[list[int]]:
    """Tokenise each text by itself, without BOS; `special`: text that spells a special token becomes that token."""
    if not texts:
        return []
    encoding = tokenizer(
        list(texts),
        add_special_tokens=False,
        split_special_tokens=not special,
        return_attention_mask=False,
        verbose=False,
    )
    return encoding["input_ids"]


def ids_before_text(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return what the tokenizer puts before a text: BOS, for some models more, for many nothing."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return full[:start]
    return []
