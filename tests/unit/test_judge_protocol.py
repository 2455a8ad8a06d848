"""What a judge is asked, and how its reply is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedit.interfaces import DataError
from fedit.judge.protocol import (
    PAIRWISE,
    SINGLE,
    Prompt,
    default_protocol,
    grade_messages,
    load_prompt,
    pair_messages,
    parse_grade,
    parse_pair,
)
from fedit.judge.questions import Question, read_answers, read_questions


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("8 9\nBoth are good.", (8, 9)),
        ("8.5 10", (8.5, 10)),
        ("\n  7, 6  \nwhy", (7, 6)),
        ("**9 8**\n", (9, 8)),
        ("0 9\nThe first is empty.", (0, 9)),
        ("<think>8 8? No.\n</think>\n\n3 4\nwhy", (3, 4)),
        ("8\n9", None),
        ("8/10 9/10", None),
        ("8/10", None),
        ("8 9 10", None),
        ("11 9", None),
        ("-1 9", None),
        ("Scores: 8 9", None),
        ("First, I solve it.\n8 9", None),
        ("eight nine", None),
        ("89", None),
        ("", None),
        ("\n \n", None),
    ],
)
def test_two_scores_stand_on_the_first_line(reply: str, scores: tuple[float, float] | None) -> None:
    assert parse_pair(reply) == scores


@pytest.mark.parametrize(
    ("reply", "scores"),
    [
        ("Good. Rating: [[8]]", (8,)),
        ("[[2]] would be low. Rating: [[ 7.5 ]]", (7.5,)),
        ("<think>[[3]]</think>none", None),
        ("Rating: 8", None),
        ("Rating: [8]", None),
        ("[[11]]", None),
        ("[[rating]]", None),
        ("", None),
    ],
)
def test_the_last_grade_in_double_brackets_counts(reply: str, scores: tuple[float] | None) -> None:
    assert parse_grade(reply) == scores


def test_nothing_inside_an_answer_is_filled_in() -> None:
    prompt = Prompt("Judge {category} in {style}.", "{question}|{answer_1}|{answer_2}|{reference}")
    question = Question("1", ("Why {answer_2}?",), "writing")
    system, user = pair_messages(prompt, question, "{question}", "\\1 {answer_1}")
    assert system == {"role": "system", "content": "Judge writing in {style}."}
    assert user == {"role": "user", "content": "Why {answer_2}?|{question}|\\1 {answer_1}|"}


def test_a_grade_sees_the_turns_so_far_and_their_reference() -> None:
    question = Question("1", ("One?", "Two?"), references=("1.", "2."))
    prompt = Prompt("", "{conversation}\n{reference}")
    (first,) = grade_messages(prompt, question, ("uno", "dos"), 0)
    assert "uno" in first["content"]
    assert "Two?" not in first["content"]
    assert "1." in first["content"]
    (second,) = grade_messages(prompt, question, ("uno", "dos"), 1)
    assert [second["content"].index(text) for text in ("One?", "uno", "Two?", "dos", "2.")] == sorted(
        second["content"].index(text) for text in ("One?", "uno", "Two?", "dos", "2.")
    )
    assert "1." not in second["content"]


def test_our_prompts_have_what_they_need_and_a_file_replaces_them(tmp_path: Path) -> None:
    for protocol in (PAIRWISE, SINGLE):
        prompt = load_prompt(protocol)
        assert prompt.system
        assert "{reference}" in prompt.user
    file = tmp_path / "prompt.txt"
    file.write_text('{question}\n{answer_1}\n{answer_2}\nAs {"json": 1}')
    assert load_prompt(PAIRWISE, file) == Prompt("", file.read_text())
    file.write_text("Be strict.\n---\n{conversation}")
    assert load_prompt(SINGLE, file) == Prompt("Be strict.", "{conversation}")
    file.write_text("{question} {answer1} {answer_2}")
    with pytest.raises(DataError, match=r"prompt.txt: .* needs \{answer_1\} .* got \{question\}, \{answer1\}"):
        load_prompt(PAIRWISE, file)
    with pytest.raises(DataError, match="cannot be read"):
        load_prompt(PAIRWISE, tmp_path / "none.txt")


# ------------------------------------------------------------------------------------------------------------- files


def write(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_questions_of_vicuna_of_mt_bench_and_of_others(tmp_path: Path) -> None:
    path = write(
        tmp_path / "q.jsonl",
        {"question_id": 1, "text": "Why?", "category": "generic"},
        {"question_id": 81, "turns": ["One?", "Two?"], "category": "math", "reference": ["1", "2"]},
        {"instruction": "Sum up.", "input": "A text."},
    )
    first, second, third = read_questions(path)
    assert first == Question("1", ("Why?",), "generic", (), f"{path}:1")
    assert second == Question("81", ("One?", "Two?"), "math", ("1", "2"), f"{path}:2")
    assert third == Question("3", ("Sum up.\n\nA text.",), "uncategorised", (), f"{path}:3")
    assert default_protocol([first, third]) == PAIRWISE
    assert default_protocol([first, second]) == SINGLE


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 1, "query": "Why?"}, r"q.jsonl:2: the fields are id, query; expected text or .* or turns"),
        ({"text": ""}, r"q.jsonl:2: text = '': expected a text"),
        ({"text": 3}, r"q.jsonl:2: text = 3: expected a text"),
        ({"turns": "Why?"}, r"q.jsonl:2: turns = 'Why\?': expected a list of texts"),
        ({"text": ["Why?"]}, r"q.jsonl:2: text = \['Why\?'\]: expected a text"),
        ({"turns": []}, r"q.jsonl:2: turns = \[\]: expected a list of texts"),
        ({"turns": ["a", 2]}, r"q.jsonl:2: turns = .* expected a list of texts"),
        ({"question_id": 1, "text": "Again?"}, r"q.jsonl:2: question_id 1 is that of .*q.jsonl:1 too"),
    ],
)
def test_questions_that_are_none(tmp_path: Path, row: dict[str, object], message: str) -> None:
    path = write(tmp_path / "q.jsonl", {"question_id": 1, "text": "Why?"}, row)
    with pytest.raises(DataError, match=message):
        read_questions(path)


def test_stored_answers_of_vicuna_and_of_fastchat(tmp_path: Path) -> None:
    questions = [Question("1", ("Why?",), source="q:1"), Question("81", ("One?", "Two?"), source="q:2")]
    path = write(
        tmp_path / "a.jsonl",
        {"question_id": 81, "choices": [{"index": 0, "turns": ["uno", "dos"]}]},
        {"question_id": 1, "text": ""},
        {"question_id": 99, "text": "asked of others"},
    )
    assert read_answers(path, questions) == {"1": ("",), "81": ("uno", "dos")}
    write(path, {"question_id": 81, "text": "uno"}, {"question_id": 1, "text": "So."})
    with pytest.raises(DataError, match=r"a.jsonl: 1 answers to question_id 81 \(q:2\), expected 2"):
        read_answers(path, questions)
    write(path, {"question_id": 1, "reply": "So."})
    with pytest.raises(DataError, match=r"a.jsonl:1: the fields are question_id, reply; expected text or"):
        read_answers(path, questions)
    with pytest.raises(DataError, match="no such file"):
        read_answers(tmp_path / "none.jsonl", questions)
