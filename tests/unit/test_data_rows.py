"""Which columns a row may have, and how a bad row is named."""

from __future__ import annotations

import json

import pytest

from fedit.data.reading import Row
from fedit.data.rows import make_examples
from fedit.interfaces import DataError, Example, Turn


def example(values: dict[str, object], file_client: str | None = None, **columns: str) -> Example:
    (made,) = make_examples([Row(values, "rows.jsonl:7", file_client)], columns)
    return made


def refusal(values: dict[str, object], **columns: str) -> str:
    with pytest.raises(DataError) as caught:
        example(values, **columns)
    return str(caught.value)


@pytest.mark.parametrize(
    "values",
    [
        {"instruction": "Sum up.", "context": "Long.", "response": "Short."},
        {"instruction": "Sum up.", "input": "Long.", "output": "Short.", "text": "ignored"},
        {"prompt": "Sum up.", "context": "Long.", "completion": "Short.", "category": None},
        {"instruction": "Sum up.", "context": None, "input": "Long.", "response": "Short.", "messages": None},
    ],
)
def test_known_layouts(values: dict[str, object]) -> None:
    assert example(values) == Example((Turn("Sum up.", "Short.", "Long."),), source="rows.jsonl:7")


def test_text_is_kept_as_it_is() -> None:
    assert example({"instruction": " a\n", "response": "  b \n"}).turns == (Turn(" a\n", "  b \n"),)


def test_optional_columns() -> None:
    values = {"instruction": "a", "response": "b", "category": 3, "client": 12, "system": "Be brief.", "checks": ""}
    made = example(values, file_client="file")
    assert (made.category, made.client, made.system, made.checks) == ("3", "12", "Be brief.", None)
    assert example({"instruction": "a", "response": "b", "client": None}, file_client="file").client == "file"


@pytest.mark.parametrize("checks", [{"answer": ["x"]}, json.dumps({"answer": ["x"]})])
def test_checks_are_an_object_or_its_json(checks: object) -> None:
    assert example({"instruction": "a", "response": "b", "checks": checks}).checks == {"answer": ["x"]}


def test_mapped_columns() -> None:
    values = {"question": "a", "answer": "b", "instruction": "not this", "site": "oslo", "messages": []}
    made = example(values, instruction="question", response="answer", client="site")
    assert (made.turns, made.client) == ((Turn("a", "b"),), "oslo")


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Goodbye"},
]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(message["role"], "system"), "value": message["content"]}
    for message in CHAT
]


@pytest.mark.parametrize(
    "values",
    [
        {"messages": CHAT},
        {"conversations": SHAREGPT},
        {"messages": CHAT[1:], "system": "Be brief."},
        {"messages": json.dumps(CHAT)},
        {"messages": CHAT, "prompt": "not read"},
    ],
)
def test_chats(values: dict[str, object]) -> None:
    made = example(values)
    assert made.turns == (Turn("Hi", "Hello"), Turn("Bye", "Goodbye"))
    assert (made.system, made.response) == ("Be brief.", "Goodbye")


def test_mapped_chat() -> None:
    assert example({"talk": SHAREGPT[1:3]}, messages="talk").turns == (Turn("Hi", "Hello"),)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"question": "a", "answer": "b"}, "no column holds the instruction (looked for instruction, prompt)"),
        ({"question": "a", "answer": "b"}, "Columns found: question, answer. Name it, e.g. [data] columns = { instru"),
        ({"instruction": "a", "answer": "b"}, "no column holds the response"),
        ({}, "Columns found: none"),
        ({"instruction": "a", "response": ""}, "the response is empty"),
        ({"instruction": "a", "response": " \n"}, "the response is empty"),
        ({"instruction": "a", "response": None}, "the response is empty"),
        ({"instruction": "", "response": "b"}, "the instruction is empty"),
        ({"instruction": "a", "response": 42}, "the response must be text, got int '42'"),
        ({"instruction": ["a"], "response": "b"}, "the instruction must be text, got list"),
        ({"instruction": "a", "response": "b", "context": 1}, "the context must be text, got int"),
        ({"instruction": "a", "response": "b", "category": True}, "the category must be text, got bool"),
        ({"instruction": "a", "response": "\ud83d"}, "the response has half a surrogate pair"),
        ({"instruction": "a", "response": "b", "checks": "{"}, "the column checks is text that is not JSON"),
        ({"instruction": "a", "response": "b", "checks": [1]}, "checks must be an object, got list"),
        ({"messages": CHAT[:-1]}, "does not end with the assistant"),
        ({"messages": CHAT[:1]}, "does not end with the assistant"),
        ({"messages": [*CHAT, CHAT[0]]}, "message 6 is from the system, expected the user"),
        ({"messages": [CHAT[0], CHAT[2]]}, "message 2 is from the assistant, expected the user"),
        ({"messages": [CHAT[1], CHAT[1], CHAT[2]]}, "message 2 is from the user, expected the assistant"),
        ({"messages": []}, "messages must be a list"),
        ({"messages": 3}, "messages must be a list"),
        ({"messages": ["Hi"]}, "message 1 must have role and content"),
        ({"messages": [{"role": "tool", "content": "4"}]}, "message 1 has role 'tool'"),
        ({"messages": [{"text": "Hi"}]}, "message 1 has role None; keys found: text"),
        ({"messages": [CHAT[1], {"role": "assistant"}]}, "the content of message 2 (assistant) is empty"),
        ({"messages": [CHAT[1], {"role": "assistant", "content": [1]}]}, "must be text, got list"),
    ],
)
def test_a_bad_row_is_named(values: dict[str, object], message: str) -> None:
    refused = refusal(values)
    assert refused.startswith("rows.jsonl:7: ")
    assert message in refused


def test_a_mapped_column_must_exist() -> None:
    message = refusal({"instruction": "a", "response": "b"}, context="passage")
    assert "no column 'passage', which [data] columns gives for context. Columns found: instruction, resp" in message


def test_messages_and_instruction_cannot_both_be_mapped() -> None:
    assert "remove instruction" in refusal({"talk": CHAT, "q": "a"}, messages="talk", instruction="q")


def test_rows_that_lie_under_a_key_are_hinted_at() -> None:
    with pytest.raises(
        DataError, match=r"'data' holds a list of objects\. If these are the rows, save that list alone"
    ):
        make_examples([Row({"version": "1", "data": [{"instruction": "a"}]}, "rows.json:1")], {})


def test_a_row_with_a_list_of_objects_of_its_own_is_a_row() -> None:
    row = Row({"instruction": "a", "response": "b", "tags": [{"name": "x"}]}, "rows.json:1")
    assert make_examples([row], {})[0].response == "b"
