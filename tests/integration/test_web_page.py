"""The page in a real browser: a question, three answers, and nothing asked of other machines."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import pytest
from chromium import Page, chromium_page

from fedit.interfaces import ConfigError, Example, Turn
from fedit.run_models import RunModels, resolve_names
from fedit.web_page import Asker, Columns, describe_run


@pytest.fixture(scope="module")
def models(asked_run: Path) -> RunModels:
    return RunModels.open(asked_run, ["base", "local", "federated"])


@pytest.fixture(scope="module")
def address(asked_run: Path) -> Iterator[str]:
    """Where `fedit ui` shows the run; a process of its own, for Gradio leaves sockets and loops to the interpreter."""
    command = [sys.executable, "-m", "fedit.cli", "ui", str(asked_run), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            assert server.stderr is not None
            yield next(found[0] for line in server.stderr if (found := re.search(r"http://\S+", line)))
        finally:
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0


@pytest.fixture
def page(address: str, tmp_path: Path) -> Iterator[Page]:
    with chromium_page(tmp_path / "browser") as page:
        page.open(address)
        page.wait_for("document.querySelector('#question textarea')")
        yield page


def ask(page: Page, question: str) -> None:
    page.evaluate("document.querySelector('#question textarea').focus()")
    page.type(question)
    page.evaluate("document.querySelector('#ask').click()")


def said(page: Page, column: str) -> list[str]:
    """The messages of a chat, questions and answers in turn."""
    script = f"JSON.stringify([...{messages(column)}].map(shown => shown.innerText))"
    return [letters(text) for text in json.loads(page.evaluate(script))]


def messages(place: str) -> str:
    """The JavaScript that finds the messages below an element."""
    return f"document.querySelectorAll('#{place} [data-testid=user], #{place} [data-testid=bot]')"


def letters(text: str) -> str:
    """What can be compared with a page's text: the model of the tests says control characters, too."""
    return "".join(letter for letter in text if letter.isprintable() and not letter.isspace())


def wait_until_quiet(page: Page, num_messages: int) -> None:
    """Wait until all chats have so many messages and grow no more for a second."""
    page.wait_for(f"{messages('federated')}.length == {num_messages}")
    text = "document.querySelector('#chats').innerText"
    later = f"new Promise(done => setTimeout(() => done({text}), 1000))"
    page.wait_for(f"(async () => {text} === await {later})()")


def press(page: Page, button: str) -> None:
    page.evaluate(f"[...document.querySelectorAll('button')].find(each => each.innerText == '{button}').click()")


@pytest.mark.slow
def test_a_question_has_three_answers(page: Page, models: RunModels) -> None:
    names = {"base": "base", "local-only": resolve_names(models.folder, ["local"])[0], "federated": "federated"}
    turns: dict[str, list[Turn]] = {column: [] for column in names}
    for question in ("ab 1?", "and?"):
        ask(page, question)
        wait_until_quiet(page, 2 * len(turns["base"]) + 2)
        asked = {names[column]: Example((*turns[column], Turn(question, ""))) for column in names}
        *_, expected = models.answer(asked, 256)
        for column, name in names.items():
            turns[column].append(Turn(question, expected[name]))
            shown = [text for turn in turns[column] for text in (turn.instruction, turn.response)]
            assert said(page, column) == [letters(text) for text in shown]
    assert len({turns[column][0].response for column in names}) == 3
    assert page.hosts == {"127.0.0.1"}
    assert page.problems == []


@pytest.mark.slow
def test_stop_clear_and_errors(page: Page) -> None:
    ask(page, "x" * 600)
    page.wait_for("document.body.innerText.includes('The question has')")
    page.evaluate("document.querySelector('#question textarea').select()")
    ask(page, "ab 1?")
    page.wait_for(f"{messages('base')}.length == 2")
    press(page, "Stop")
    wait_until_quiet(page, 2)
    stopped = said(page, "base")
    ask(page, "ab 1?")  # the conversation goes on
    wait_until_quiet(page, 4)
    assert said(page, "base")[1].startswith(stopped[1]), "what was said by then is part of it"
    assert len(said(page, "base")[3]) > len(stopped[1]) > 0
    press(page, "Clear")
    page.wait_for(f"{messages('chats')}.length == 0")


# -------------------------------------------------------------------------------------------------------- its columns


def titles(models: RunModels, client: str) -> dict[str, str]:
    return {title: model(client) for title, model in Columns.of(models).models.items()}


def test_one_client_is_chosen_among_those_that_have_models(models: RunModels) -> None:
    columns = Columns.of(models)
    assert list(columns.clients) == ["0", "1", "2"]
    assert [f"local/{columns.median}"] == resolve_names(models.folder, ["local"])
    assert titles(models, "1") == {"Base": "base", "Local-only": "local/1", "Federated": "federated"}


def test_a_run_without_baselines_says_so(fedit, recipe, tmp_path) -> None:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "evaluation.baselines=false")
    assert done.status == 0, done.stderr
    models = RunModels.open(tmp_path / "run", ["base"])
    assert titles(models, "") == {"Base": "base", "Federated": "federated"}
    heading = describe_run(models, Columns.of(models))
    assert "No local-only model: it was run without baselines" in heading
    assert "3 clients" in heading


def test_a_run_that_leaves_each_client_its_own_model(fedit, recipe, tmp_path) -> None:
    options: Any = ("-o", "aggregation.name=fedsa-lora")
    assert fedit("run", recipe, "--out", tmp_path / "run", *options).status == 0
    models = RunModels.open(tmp_path / "run", ["base"])
    assert titles(models, "2") == {"Base": "base", "Local-only": "local/2", "Federated": "federated/2"}


def test_the_client_shown_first_has_every_model(fedit, recipe, tmp_path) -> None:
    """The median client was never drawn; and before the evaluation there is no median."""
    run = tmp_path / "run"
    assert fedit("run", recipe, "--out", run, "-o", "aggregation.name=fedsa-lora").status == 0
    models = RunModels.open(run, ["base"])
    median = Columns.of(models).median
    shutil.move(run / "adapters" / median, tmp_path / "away")
    columns = Columns.of(models)
    assert median not in columns.clients
    assert columns.median == columns.clients[0]
    (run / "evaluation.json").unlink()
    assert Columns.of(models).median == columns.clients[0]
    with pytest.raises(ConfigError, match=r"It is not evaluated, .* name a client: local/0"):
        resolve_names(run, ["local"])


def test_questions_are_answered_one_after_the_other(models: RunModels, monkeypatch) -> None:
    """Also where the one before was stopped, and its answer is not closed yet."""
    asker = Asker(models, Columns.of(models))
    active, most = list[int](), list[int]()
    streamed = RunModels.stream

    def noted(self: RunModels, *arguments: Any) -> Iterator[Any]:
        active.append(1)
        most.append(len(active))
        try:
            yield from streamed(self, *arguments)
        finally:
            active.pop()

    monkeypatch.setattr(RunModels, "stream", noted)
    first = asker.ask("ab 1?", "", "0", [], 1.0, 1.0, 200, "1")
    next(first)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(lambda: len(list(asker.ask("cde 2?", "", "0", [], 0.0, 1.0, 3, ""))))
        done, _ = wait([second], timeout=1)
        assert not done
        first.close()
        assert second.result() > 0
    assert most == [1, 1]


def test_an_unfinished_run(fedit, asked_run: Path, tmp_path: Path) -> None:
    shutil.copytree(asked_run, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    for command in ("ui", "serve", "chat"):
        done = fedit(command, tmp_path / "run")
        assert done.status == 1
        assert f"Finish it with `fedit run --resume {tmp_path / 'run'}`" in done.stderr
