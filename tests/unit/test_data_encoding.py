"""Ids and supervised positions, by hand: the tokenizer of these tests makes one token of each byte."""

from __future__ import annotations

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from fedit.config import DataConfig
from fedit.data import Dropped, EncodingReport, PlainTemplate, encode, encode_all, encode_prompt
from fedit.interfaces import DataError, EncodedExample, Example, Segment, Template, Turn

PLAIN = PlainTemplate()


def byte_tokenizer(bos: bool = False, eos: str | None = "</s>") -> PreTrainedTokenizerFast:
    symbols = ["<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(symbols)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token=eos)


def row(instruction: str, response: str, context: str = "", source: str = "rows.jsonl:1") -> Example:
    return Example((Turn(instruction, response, context),), source=source)


def encoded(example: Example, tokenizer: PreTrainedTokenizerFast, max_length: int = 512) -> EncodedExample:
    result = encode(example, PLAIN, tokenizer, max_length)
    assert isinstance(result, EncodedExample)
    return result


def supervised_text(result: EncodedExample, tokenizer: PreTrainedTokenizerFast) -> str:
    return str(tokenizer.decode(result.input_ids[result.supervised]))


def test_one_turn_by_hand() -> None:
    tokenizer = byte_tokenizer()
    result = encoded(row("ab", "cd"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(result.input_ids.tolist()) == ["a", "b", "Ċ", "c", "d", "</s>"]
    assert result.supervised.tolist() == [False, False, False, True, True, True]
    assert (result.input_ids.dtype, result.supervised.dtype) == (np.int32, np.bool_)
    assert result.prompt_ids.tolist() == result.input_ids[:3].tolist()


def test_turns_and_bos_by_hand() -> None:
    tokenizer = byte_tokenizer(bos=True)
    chat = Example((Turn("a", "b"), Turn("c", "d", context="x")), system="s")
    result = encoded(chat, tokenizer)
    assert tokenizer.decode(result.input_ids) == "<s>s\n\na\nb</s>\n\nc\n\nx\nd</s>"
    assert supervised_text(result, tokenizer) == "b</s>d</s>"
    assert tokenizer.decode(result.prompt_ids) == "<s>s\n\na\nb</s>\n\nc\n\nx\n"


def test_special_tokens_in_a_row_are_only_text() -> None:
    tokenizer = byte_tokenizer(bos=True)
    result = encoded(row("What is </s>?", "<s> and </s> mark a text"), tokenizer)
    assert (result.input_ids == tokenizer.eos_token_id).nonzero()[0].tolist() == [len(result) - 1]
    assert (result.input_ids == tokenizer.bos_token_id).nonzero()[0].tolist() == [0]
    assert supervised_text(result, tokenizer) == "<s> and </s> mark a text</s>"


def test_no_eos_is_refused() -> None:
    with pytest.raises(DataError, match="no end-of-sequence token"):
        encode(row("a", "b"), PLAIN, byte_tokenizer(eos=None), 512)


def test_no_pad_token_is_needed() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.pad_token is None
    assert supervised_text(encoded(row("a", "b"), tokenizer), tokenizer) == "b</s>"


def test_pad_equal_to_eos_leaves_eos_supervised() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    assert encoded(row("a", "b"), tokenizer).supervised[-1]


def test_context_loses_its_end() -> None:
    tokenizer = byte_tokenizer()
    example = row("ask", "answer", context="0123456789")  # 3 + 2 + 10 + 1 + 6 + 1 tokens
    assert tokenizer.decode(encoded(example, tokenizer, 23).input_ids) == "ask\n\n0123456789\nanswer</s>"
    for max_length in range(14, 23):
        result = encoded(example, tokenizer, max_length)
        kept = "0123456789"[: max_length - 13]
        assert tokenizer.decode(result.input_ids) == f"ask\n\n{kept}\nanswer</s>"
        assert result.example is example


def test_a_cut_never_splits_a_character() -> None:
    tokenizer = byte_tokenizer()
    result = encoded(row("ask", "answer", context="ab\N{BLACK CHESS QUEEN}cd"), tokenizer, 13 + 4)
    assert tokenizer.decode(result.prompt_ids) == "ask\n\nab\n"


def test_the_longest_context_of_a_chat_is_cut() -> None:
    tokenizer = byte_tokenizer()
    chat = Example((Turn("a", "b", context="xy"), Turn("c", "d", context="0123456789")))
    full = len(encoded(chat, tokenizer))
    assert tokenizer.decode(encoded(chat, tokenizer, full - 8).input_ids) == "a\n\nxy\nb</s>\n\nc\n\n01\nd</s>"


@pytest.mark.parametrize(
    ("example", "max_length"),
    [
        (row("a prompt that is longer than the cutoff", "b"), 20),
        (row("ask", "a response that is longer than the cutoff"), 20),
        (row("a prompt that is longer than the cutoff", "b", context="0123456789"), 20),
        (row("ask", "answer", context="0123456789"), 13),  # would fit without any of its context
        (row("ask", "answer", context="          x"), 15),  # spaces only are no context
    ],
)
def test_what_cannot_be_shortened_is_dropped(example: Example, max_length: int) -> None:
    result = encode(example, PLAIN, byte_tokenizer(), max_length)
    assert result == Dropped("rows.jsonl:1", "longer than max_length even without the end of its context")


def test_slow_tokenizers_cut_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PreTrainedTokenizerFast, "is_fast", property(lambda self: False))
    tokenizer = byte_tokenizer()
    result = encoded(row("ask", "answer", context="\N{BLACK CHESS QUEEN}" * 30), tokenizer, 40)
    assert 40 - 3 <= len(result) <= 40
    assert supervised_text(result, tokenizer) == "answer</s>"


def test_report() -> None:
    rows = [
        row("ask", "answer", source="rows.jsonl:1"),
        row("ask", "answer", context="0123456789", source="rows.jsonl:2"),
        row("ask", "an answer beyond the cutoff", source="rows.jsonl:3"),
    ]
    config = DataConfig.model_validate({"template": "plain", "max_length": 16})
    results, report = encode_all(rows, config, byte_tokenizer())
    assert [result.example for result in results] == rows[:2]
    assert report == EncodingReport(
        rows=2,
        tokens=11 + 16,
        supervised_tokens=14,
        truncated=1,
        too_long=1,
        all_masked=0,
        special_token_text=0,
        dropped_sources=("rows.jsonl:3: longer than max_length even without the end of its context",),
    )
    assert report.dropped == 1


def test_batches_keep_the_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedit.data.encoding._BATCH_SIZE", 3)
    rows = [row(f"ask {i}", "yes", context="x" * (i % 4) * 20) for i in range(10)]
    config = DataConfig.model_validate({"template": "plain", "max_length": 40})
    results, report = encode_all(rows, config, byte_tokenizer())
    assert [result.example for result in results] == rows
    assert report.truncated == sum(i % 4 > 1 for i in range(10))


def test_nothing_left_is_an_error() -> None:
    config = DataConfig.model_validate({"template": "plain", "max_length": 8})
    with pytest.raises(DataError, match=r"None of the 1 rows can be trained on.*First: rows.jsonl:1: longer"):
        encode_all([row("ask", "a long answer")], config, byte_tokenizer())
    assert encode_all([], config, byte_tokenizer())[0] == []


def test_a_response_without_tokens_is_left_out() -> None:
    backend = Tokenizer(models.BPE(vocab={"</s>": 0, "a": 1, "b": 2}, merges=[]))  # no unk: other characters vanish
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    config = DataConfig.model_validate({"template": "plain"})
    results, report = encode_all([row("ab", "?"), row("ab", "b")], config, tokenizer)
    assert [result.input_ids.tolist() for result in results] == [[1, 2, 2, 0]]
    assert (report.all_masked, report.dropped) == (1, 1)
    with pytest.raises(DataError, match="makes no token of the prompt"):
        encode(row("?", "b"), PLAIN, tokenizer, 512)


def test_prompt_of_a_conversation_in_progress() -> None:
    tokenizer = byte_tokenizer(bos=True)
    finished = Example((Turn("a", "b"), Turn("c", "d", context="x")), system="s")
    unfinished = Example((Turn("a", "b"), Turn("c", "", context="x")), system="s")
    ids = encode_prompt(unfinished, PLAIN, tokenizer)
    assert ids.dtype == np.int32
    assert ids.tolist() == encoded(finished, tokenizer).prompt_ids.tolist()


@pytest.mark.parametrize("segments", [[], [Segment("a", True)], [Segment("a", False)], [Segment("a", True)] * 2])
def test_a_template_must_end_with_prompt_and_response(
    segments: list[Segment], registry: dict[str, dict[str, type]]
) -> None:
    class Broken(Template):
        name = "broken"

        def render(self, example: Example, tokenizer: object) -> list[Segment]:
            return segments

    with pytest.raises(DataError, match=r"rows.jsonl:1: template 'broken' must render a prompt"):
        encode(row("a", "b"), Broken(), byte_tokenizer(), 512)
