"""Questions and stored answers, from files as Vicuna, FastChat and others write them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fedit.data.reading import Row, read_path
from fedit.interfaces import DataError

QUESTION_FIELDS = ("text", "question", "instruction", "prompt")
"""What a question of one turn may be called; `turns` is a list of them"""
ANSWER_FIELDS = ("text", "answer", "response", "output")


@dataclass(frozen=True, slots=True)
class Question:
    """What the models are asked, turn by turn."""

    question_id: str
    turns: tuple[str, ...]
    category: str = "uncategorised"
    references: tuple[str, ...] = ()
    """A reference answer for each of the first turns; empty: there is none"""
    source: str = ""
    """Where it stands, e.g. ``questions.jsonl:17``"""


def read_questions(path: Path) -> list[Question]:
    """Return the questions of a file.

    Vicuna's fields (``question_id``, ``text``, ``category``), MT-Bench's (``turns``, and optionally ``reference``), or
    any file with one of `QUESTION_FIELDS` in every row; ``context`` or ``input`` stands below the question. Without a
    ``question_id`` it is the row's number.

    Raises:
        DataError: no such file, no such fields, or the same ``question_id`` twice; names the line.
    """
    questions = [_question(row, number) for number, row in enumerate(_rows(path), start=1)]
    first: dict[str, Question] = {}
    for question in questions:
        other = first.setdefault(question.question_id, question)
        if other is not question:
            raise DataError(
                f"{question.source}: question_id {question.question_id} is that of {other.source} too. Expected each "
                "once."
            )
    return questions


def read_answers(path: Path, questions: Sequence[Question]) -> dict[str, tuple[str, ...]]:
    """Return a model's stored answers to `questions`, one for each turn, by ``question_id``.

    Vicuna's fields (``question_id`` and ``text``), FastChat's (``choices[0].turns``), or one of `ANSWER_FIELDS`.

    Raises:
        DataError: no such file, no such fields, or a question without an answer to each of its turns.
    """
    answers = {}
    for row in _rows(path):
        question_id = row.values.get("question_id")
        if not isinstance(question_id, str | int):
            raise DataError(f"{row.source}: question_id = {question_id!r}: expected that of a question.")
        answers[str(question_id)] = _answer_turns(row)
    for question in questions:
        got = answers.get(question.question_id, ())
        if len(got) < len(question.turns):
            raise DataError(
                f"{path}: {len(got)} answers to question_id {question.question_id} ({question.source}), expected "
                f"{len(question.turns)}: one for each turn. Add them, or leave the question out."
            )
    return {question.question_id: answers[question.question_id] for question in questions}


def _rows(path: Path) -> list[Row]:
    if not path.is_file():
        raise DataError(f"{path}: no such file (seen from {Path.cwd()}). Expected one JSON object per line.")
    return read_path(str(path), seed=0).train


def _question(row: Row, number: int) -> Question:
    values = row.values
    if "turns" in values:
        turns = _texts(row, "turns")
    else:
        text = _text(row, QUESTION_FIELDS, "turns")
        context = values.get("context") or values.get("input") or ""
        turns = (f"{text}\n\n{context}" if context else text,)
    references = _texts(row, "reference", may_be_one=True) if values.get("reference") else ()
    return Question(
        question_id=str(values.get("question_id", number)),
        turns=turns,
        category=str(values.get("category") or "uncategorised"),
        references=references,
        source=row.source,
    )


def _answer_turns(row: Row) -> tuple[str, ...]:
    choices = row.values.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], Mapping):
        return _texts(Row(choices[0], f"{row.source}, choices[0]"), "turns")
    if "turns" in row.values:
        return _texts(row, "turns")
    return (_text(row, ANSWER_FIELDS, "choices", may_be_empty=True),)


def _text(row: Row, names: Sequence[str], *others: str, may_be_empty: bool = False) -> str:
    """Return the value of the first of `names` that the row has; `others` are named where it has none."""
    for name in names:
        value = row.values.get(name)
        if value is not None:
            if isinstance(value, str) and (may_be_empty or value.strip()):
                return value
            raise DataError(f"{row.source}: {name} = {value!r}: expected a text.")
    raise DataError(
        f"{row.source}: the fields are {', '.join(row.values) or 'none'}; expected {' or '.join((*names, *others))}."
    )


def _texts(row: Row, name: str, *, may_be_one: bool = False) -> tuple[str, ...]:
    value = row.values.get(name)
    if may_be_one and isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise DataError(f"{row.source}: {name} = {value!r}: expected a list of texts, one for each turn.")
    return tuple(value)
