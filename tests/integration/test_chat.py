"""A run's models on the terminal: for scripts, and for somebody who types."""

from __future__ import annotations

import builtins
import os
import pty
import select
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedit.interfaces import Example, Turn
from fedit.run_models import RunModels


def typed(monkeypatch: pytest.MonkeyPatch, lines: Sequence[str]) -> None:
    monkeypatch.setattr(sys, "stdin", StringIO("".join(f"{line}\n" for line in lines)))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """What the models were shown."""
    shown: list[list[int]] = []
    prompt = RunModels.prompt

    def noted(self: RunModels, *arguments: Any) -> np.ndarray:
        ids = prompt(self, *arguments)
        shown.append(ids.tolist())
        return ids

    monkeypatch.setattr(RunModels, "prompt", noted)
    return shown


def answer(folder: Path, name: str, question: str, most: int) -> str:
    *_, answers = RunModels.open(folder, [name]).answer({name: Example((Turn(question, ""),))}, most)
    return answers[name]


# ------------------------------------------------------------------------------------------------------------ scripts


def test_answers_go_to_standard_output_one_after_the_other(fedit, asked_run, monkeypatch) -> None:
    """/new forgets, so the same question has the same answer again."""
    typed(monkeypatch, ["ab 1?", "", "/new", "ab 1?", "/quit", "never asked"])
    done = fedit("chat", asked_run, "--max-new-tokens", "5")
    assert done.status == 0, done.stderr
    expected = answer(asked_run, "federated", "ab 1?", 5)
    assert done.stdout == f"{expected}\n{expected}\n"


@pytest.mark.parametrize("name", ["base", "central", "local/1"])
def test_other_models(fedit, asked_run, monkeypatch, name: str) -> None:
    typed(monkeypatch, ["ab 1?"])  # and the end of the input ends it
    assert fedit("chat", asked_run, "--model", name, "--max-new-tokens", "9").stdout == (
        answer(asked_run, name, "ab 1?", 9) + "\n"
    )


def test_commands_of_a_script_are_obeyed(fedit, asked_run, monkeypatch) -> None:
    typed(monkeypatch, ["/help", "/model base", "ab 1?"])
    done = fedit("chat", asked_run, "--max-new-tokens", "5")
    assert done.stdout == answer(asked_run, "base", "ab 1?", 5) + "\n"
    assert "starts over" in done.stderr
    assert "> " not in done.stderr


def test_the_turns_are_remembered(fedit, asked_run, monkeypatch, prompts) -> None:
    typed(monkeypatch, ["ab 1?", "why?", "/new", "ab 1?"])
    assert fedit("chat", asked_run, "--max-new-tokens", "5").status == 0
    first, second, third = prompts
    assert len(second) > len(first)
    assert first == third


def test_it_goes_on_after_a_question_that_is_too_long(fedit, asked_run, monkeypatch) -> None:
    typed(monkeypatch, ["ab 1?", "x" * 5000, "ab 1?"])
    done = fedit("chat", asked_run, "--max-new-tokens", "5")
    assert done.status == 0, done.stderr
    assert "The question has" in done.stderr
    assert len(done.stdout.splitlines()) >= 2


def test_it_goes_on_after_what_is_no_text(fedit, asked_run, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", TextIOWrapper(BytesIO(b"caf\xe9\nab 1?\n"), encoding="utf-8"))
    done = fedit("chat", asked_run)
    assert done.status == 0, done.stderr
    assert "Character 4 is no text" in done.stderr
    assert done.stdout.strip()


def test_sampling(fedit, asked_run, monkeypatch) -> None:
    said = []
    for seed in ("1", "1", "2"):
        typed(monkeypatch, ["ab 1?"])
        said.append(fedit("chat", asked_run, "--temperature", "2", "--top-p", "0.9", "--seed", seed).stdout)
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "local/7"], "no model 'local/7'. Did you mean 'local/"),
        (["--temperature", "-1"], "temperature = -1.0: expected 0 (greedy), or a number"),
        (["--temperature", "1", "--seed", "9" * 20], "expected a whole number from -2^63 to 2^64 - 1"),
        (["--max-new-tokens", "0"], "--max-new-tokens 0: expected 1 or more"),
    ],
)
def test_what_cannot_be_is_refused(fedit, asked_run, options: list[str], message: str) -> None:
    done = fedit("chat", asked_run, *options)
    assert done.status == 1
    assert message in done.stderr


# ----------------------------------------------------------------------------------------------------------- terminal


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def talk(fedit, asked_run, monkeypatch) -> Callable[..., Any]:
    """Talk to the run by lines that are typed, or exceptions that keys raise; then Ctrl-D."""

    def talk(*lines: str | type[BaseException], options: Sequence[str] = ()) -> Any:
        left = iter([*lines, EOFError])

        def read(prompt: str) -> str:
            line = next(left)
            if isinstance(line, str):
                return line
            raise line

        monkeypatch.setattr(builtins, "input", read)
        monkeypatch.setattr(sys, "stdin", Terminal())
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        return fedit("chat", asked_run, "--max-new-tokens", "8", *options)

    return talk


def test_what_is_typed_on_a_terminal(talk, asked_run, prompts) -> None:
    done = talk("ab 1?", KeyboardInterrupt, "/new", "/model base", "ab 1?", "/model", "/modle", "x" * 5000, "/model x")
    assert done.status == 0
    assert done.stdout.split("\n")[0] == answer(asked_run, "federated", "ab 1?", 8)
    assert answer(asked_run, "base", "ab 1?", 8) in done.stdout
    assert "federated of" in done.stderr
    assert "Ctrl-D or /quit ends." in done.stderr
    assert "base goes on; /new starts over." in done.stderr
    assert "* base\n  local/0\n" in done.stderr
    assert "ends an answer" in done.stderr  # the help
    assert "The question has" in done.stderr
    assert "no model 'x'" in done.stderr
    assert len(prompts) == 4, "two questions, and those of this test"


def test_an_answer_grows_and_can_be_interrupted(talk, monkeypatch, prompts) -> None:
    """What was said by then is part of the conversation."""
    stream = RunModels.stream
    closed = []

    def interrupted(self: RunModels, *arguments: Any) -> Iterator[Any]:
        steps = stream(self, *arguments)
        try:
            for number, step in enumerate(steps):
                if number == 3 and not closed:
                    raise KeyboardInterrupt
                yield step
        finally:
            closed.append(True)

    monkeypatch.setattr(RunModels, "stream", interrupted)
    done = talk("ab 1?", "and?")
    assert done.status == 0
    first, rest = done.stdout.split(" ...\n")
    assert 0 < len(first) <= 3
    assert rest.strip()
    assert len(prompts[1]) == len(prompts[0]) + len(first.encode()) + len("\n\nand?\n") + 1


@pytest.mark.slow
def test_a_real_terminal_brings_back_what_was_typed(asked_run: Path) -> None:
    """The arrow up asks the same again."""
    mine, its = pty.openpty()
    command = [sys.executable, "-m", "fedit.cli", "chat", str(asked_run), "--max-new-tokens", "4"]
    environment = {**os.environ, "TERM": "dumb"}
    with subprocess.Popen(
        command, stdin=its, stdout=its, stderr=subprocess.DEVNULL, env=environment, start_new_session=True
    ) as chat:
        os.close(its)
        seen = ""

        def wait_for(text: str, count: int = 1) -> None:
            nonlocal seen
            while seen.count(text) < count:
                assert select.select([mine], [], [], 90)[0], seen
                seen += os.read(mine, 4096).decode()

        wait_for("> ")
        os.write(mine, b"ab 1?\n")
        wait_for("> ", 2)
        os.write(mine, b"\x1b[A\n")
        wait_for("> ", 3)
        os.write(mine, b"\x04")
        assert chat.wait(30) == 0
    os.close(mine)
    assert seen.count("ab 1?") == 2
