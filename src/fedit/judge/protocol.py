"""What a judge is asked, and how its reply is read. Pure functions.

Pairwise is FedIT's protocol (2305.05644), which is Vicuna's: the judge sees a question with two answers, and gives two
scores from 1 to 10 on its first line. Single is MT-Bench's single-answer grading (2306.05685): one answer, each turn by
itself, and a grade as ``[[grade]]``. The words of the prompts are fedit's own.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from fedit.interfaces import DataError
from fedit.judge.questions import Question

PAIRWISE, SINGLE = "pairwise", "single"
PLACEHOLDERS = {PAIRWISE: ("question", "answer_1", "answer_2"), SINGLE: ("conversation",)}
"""What a prompt of each protocol must have in braces; ``{reference}`` and ``{category}`` may stand there too."""
HIGHEST = 10
"""Scores are asked for from 1 on; one of 0 is taken as it is, for leaving it out would be in the answer's favour."""

Messages = list[dict[str, str]]

_NUMBER = r"(\d+(?:\.\d+)?)"
_PAIR = re.compile(rf"{_NUMBER}(?:\s*[,;]\s*|\s+){_NUMBER}")
_GRADE = re.compile(rf"\[\[\s*{_NUMBER}\s*\]\]")
_THOUGHTS = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Prompt:
    """The text that a judge is asked with, in two parts."""

    system: str
    """May be empty"""
    user: str

    def fill(self, values: Mapping[str, str]) -> Messages:
        """Return the messages; braces inside of `values`, or around other words, stay as they are."""
        fill = lambda text: re.sub(r"\{(\w+)\}", lambda found: values.get(found[1], found[0]), text)
        system = [{"role": "system", "content": fill(self.system)}] if self.system else []
        return [*system, {"role": "user", "content": fill(self.user)}]


def default_protocol(questions: Sequence[Question]) -> str:
    """Return the protocol for questions: only single grading knows several turns."""
    return SINGLE if any(len(question.turns) > 1 for question in questions) else PAIRWISE


def load_prompt(protocol: str, path: Path | None = None) -> Prompt:
    """Return fedit's prompt of a protocol, or that of a file.

    What stands above a line ``---`` is the system message.

    Raises:
        DataError: no such file, or it lacks one of the `PLACEHOLDERS`.
    """
    if path is None:
        text = (files("fedit.judge") / "prompts" / f"{protocol}.txt").read_text(encoding="utf-8")
    else:
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: the judge's prompt cannot be read: {error}.") from error
    above, line, below = text.partition("\n---\n")
    prompt = Prompt(above.strip(), below.strip()) if line else Prompt("", text.strip())
    missing = [f"{{{name}}}" for name in PLACEHOLDERS[protocol] if f"{{{name}}}" not in prompt.user]
    if missing:
        got = ", ".join(dict.fromkeys(re.findall(r"\{\w+\}", text))) or "nothing in braces"
        raise DataError(
            f"{path}: a prompt of the {protocol} protocol needs {', '.join(missing)} in its message; got {got}."
        )
    return prompt


def pair_messages(prompt: Prompt, question: Question, first: str, second: str) -> Messages:
    """Return what asks for the scores of two answers to a question of one turn, in this order."""
    values = {"question": question.turns[0], "answer_1": first, "answer_2": second}
    return prompt.fill({**values, "category": question.category, "reference": _reference(question, 0)})


def grade_messages(prompt: Prompt, question: Question, answers: Sequence[str], turn: int) -> Messages:
    """Return what asks for the grade of the answer to `turn` (from 0), the turns before it in view."""
    conversation = "\n\n".join(
        f"<user>\n{asked}\n</user>\n\n<assistant>\n{answered}\n</assistant>"
        for asked, answered in zip(question.turns[: turn + 1], answers[: turn + 1], strict=True)
    )
    values = {"conversation": conversation, "category": question.category}
    return prompt.fill({**values, "reference": _reference(question, turn)})


def _reference(question: Question, turn: int) -> str:
    text = question.references[turn] if turn < len(question.references) else ""
    return f"A correct answer, to compare with:\n\n<reference>\n{text}\n</reference>\n\n" if text else ""


def parse_pair(reply: str) -> tuple[float, ...] | None:
    r"""Return the two scores of a reply's first line; None: it does not hold two numbers up to 10 and nothing else.

    Asterisks around the numbers, and thoughts that a reasoning model shows first, are not looked at.

    Examples:
        >>> parse_pair("8 9.5\nBoth answers are helpful.")
        (8.0, 9.5)
        >>> parse_pair("**8** **9**")
        (8.0, 9.0)
        >>> parse_pair("Answer 1 deserves 8, answer 2 deserves 9.") is None
        True
    """
    lines = _THOUGHTS.sub("", reply).strip().splitlines()
    found = _PAIR.fullmatch(lines[0].replace("*", "").strip()) if lines else None
    return None if found is None else _in_range(*found.groups())


def parse_grade(reply: str) -> tuple[float, ...] | None:
    """Return the last grade in double brackets; None: there is none up to 10.

    Examples:
        >>> parse_grade("Not wrong, but short. Rating: [[4]]")
        (4.0,)
    """
    found = _GRADE.findall(_THOUGHTS.sub("", reply))
    return _in_range(found[-1]) if found else None


def _in_range(*numbers: str) -> tuple[float, ...] | None:
    scores = tuple(map(float, numbers))
    return scores if max(scores) <= HIGHEST else None
