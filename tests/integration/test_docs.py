"""Every block of the documentation is run, with a tiny model and tiny rows behind the names that pages use.

How a page says that something cannot run here is in `pages`. Each page has a folder of its own, in which its blocks run
in order, after what its `first` marks say.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import dp_accounting
import pytest
from cyclopts import CycloptsError
from judging import serving
from packaging.requirements import Requirement
from pages import PAGES, REPOSITORY, Block, Simple, mentioned, read_blocks, split
from reader import make_reader

from fedit import accounting, cli
from fedit.audit import canaries, mechanism
from fedit.config import load_plugins, parse_config
from fedit.config import loading as config_loading
from fedit.engines.site_folder import SiteConfig
from fedit.interfaces import FeditError
from fedit.study import load_study

load_plugins()

SHELL = {"bash", "console"}
MAX_UNRUN = 0.1
"""The share of the commands that may be marked as not run"""
SETS_UP = {"apt", "cd", "export", "git", "pre-commit", "python3", "sbatch", "source", "sudo"}
"""Commands of the machine's and not of ours, which a test must not run"""
SMALLER = {
    "audit": ["--rounds", "1"],
    "bench": ["--rows", "2", "--length", "20", "--repetitions", "1"],
    "evaluate": ["--limit", "2"],
}
"""What is added to a command that would take long whatever the model, unless the page says it"""

TASK = {"SLURM_ARRAY_TASK_ID": "0", "SLURM_CPUS_PER_TASK": "1"}


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A reader's files, and the tiny forms of what fedit ships."""
    folder = tmp_path_factory.mktemp("world")
    make_reader(folder, tiny_model_folder)
    return folder


@pytest.fixture
def page_folder(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, registry: dict[str, Any]
) -> Iterator[Path]:
    """The working folder of a page; shipped names stand for their tiny forms, and a judge answers."""
    folder = tmp_path / "reader"
    shutil.copytree(world / "reader", folder)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(
        config_loading, "_shipped", lambda kind: {path.stem: path for path in sorted((world / kind).glob("*.toml"))}
    )
    for module, name, value in (
        (mechanism, "NUM_RUNS", 2),
        (mechanism, "NUM_CANARIES", 256),
        (canaries, "NUM_SECRETS", 16),
        (canaries, "NUM_EACH", 2),
    ):
        monkeypatch.setattr(module, name, value)
    process, alone = subprocess.run, threading.Lock()

    def run(command: list[str], **options: Any) -> Any:
        """Run a study's runs in this process: importing takes longer than a tiny run."""
        if command[:3] != [sys.executable, "-m", "fedit.cli"]:
            return process(command, **options)
        with alone:
            return SimpleNamespace(returncode=status_of(command[3:]))

    monkeypatch.setattr(subprocess, "run", run)
    with serving() as judge:
        judge.models = ("gpt-4o",)
        monkeypatch.setenv("OPENAI_BASE_URL", judge.url)
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        yield folder


@pytest.fixture(autouse=True)
def quick_accountant(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The accountant that is at once; what is remembered of it is forgotten."""
    monkeypatch.setattr(dp_accounting.pld, "PLDAccountant", lambda: dp_accounting.rdp.RdpAccountant(accounting.ORDERS))
    yield
    accounting.spent_epsilon.cache_clear()
    accounting.noise_for.cache_clear()


def status_of(arguments: list[str]) -> int:
    """Run ``fedit <arguments>`` in this process and return its exit status."""
    try:
        cli.main(arguments)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def assert_parses(arguments: list[str], where: str) -> None:
    """Every word is an argument that the command line knows."""
    try:
        cli.app.parse_args(arguments, print_error=False, exit_on_error=False)
    except CycloptsError as error:
        pytest.fail(f"{where}: fedit {' '.join(arguments)}: {error}")


def fedit_arguments(command: Simple) -> list[str] | None:
    """Return the arguments of ``fedit``, which ``make run`` calls as well; None: it is another command."""
    if command.words[0] == "fedit":
        return command.words[1:]
    if command.words[:2] == ["make", "run"]:
        given = dict(word.split("=", 1) for word in command.words[2:])
        return ["run", *given.get("ARGS", "").split()]
    return None


def smaller(arguments: list[str]) -> list[str]:
    more = SMALLER.get(arguments[0], [])
    added = [part for i in range(0, len(more), 2) if more[i] not in arguments for part in more[i : i + 2]]
    if "--shape" in arguments:
        arguments[arguments.index("--shape") + 1] = "llama-3m"
    files = [sorted(map(str, Path().glob(word))) if "*" in word else [word] for word in arguments]
    return [*(file for each in files for file in each), *added]


def assert_known_tool(command: Simple, where: str) -> None:
    """What is not fedit: targets of the Makefile, extras of the package, scripts of the repository, or set-up."""
    words = command.words
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, f"{where}: make {words[1]} is no target"
    elif words[0] == "pip":
        project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
        for word in words:
            if word.startswith("fedit"):
                unknown = Requirement(word).extras - project["optional-dependencies"].keys()
                assert not unknown, f"{where}: fedit has no extra {unknown}"
    elif words[0] in {"python", "python3"} and words[1].endswith(".py"):
        assert (REPOSITORY / words[1]).is_file(), f"{where}: there is no {words[1]}"
    else:
        assert words[0] in SETS_UP, f"{where}: nobody runs {' '.join(words)!r}. Mark the block: <!-- not run: why -->"


def _json(block: Block) -> None:
    """One value, or some after each other."""
    text, decoder = block.text.strip(), json.JSONDecoder()
    while text:
        _, end = decoder.raw_decode(text)
        text = text[end:].strip()


class Page:
    """Runs the blocks of one page in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        self._names: dict[str, Any] = {"__name__": "page"}
        self._run: Mapping[str, Callable[[Block], None]] = {
            "bash": self._shell,
            "console": self._shell,
            "python": self._python,
            "toml": self._toml,
            "json": _json,
            "yaml": lambda block: None,
            "text": lambda block: None,
            "": lambda block: None,
        }

    def run(self, block: Block) -> None:
        assert block.language in self._run, f"{block.where}: write what ```{block.language} is, or text"
        for mark in block.marks:
            if mark.kind == "first":
                self._command(mark.text, block)
        self._run[block.language](block)

    def _shell(self, block: Block) -> None:
        if block.title:
            self._script(block)
            return
        for command in block.commands():
            elsewhere = block.marked("not run", command) or block.marked("run by", command)
            if elsewhere is None:
                self._command(command, block)

    def _script(self, block: Block) -> None:
        """Let bash run a script, twice, as an array's first task; what it calls fedit with is run here after it."""
        program = Path("bin/fedit").absolute()
        program.parent.mkdir(exist_ok=True)
        program.write_text("#!/bin/bash\n(printf '%q ' fedit \"$@\"; echo) >> calls\n")
        program.chmod(0o755)
        environment = os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", **TASK}
        for _ in range(2):
            Path("calls").unlink(missing_ok=True)
            subprocess.run(["bash", "-eu", block.title], env=environment, check=True)
            for command in Path("calls").read_text().splitlines():
                self._command(command, block)

    def _command(self, command: str, block: Block) -> None:
        for each in split(command):
            arguments = fedit_arguments(each)
            if arguments is None:
                assert_known_tool(each, block.where)
                continue
            self._patch.setattr("sys.stdin", io.StringIO(f"{each.stdin or 'ab 1?'}\n"))
            printed = io.StringIO()
            with redirect_stdout(printed):
                status = status_of(smaller(arguments))
            assert status == 0, f"{block.where}: {command} ended with {status}\n{printed.getvalue()}"
            if each.output:
                Path(each.output).write_text(printed.getvalue(), encoding="utf-8")

    def _python(self, block: Block) -> None:
        if block.marked("not run") is not None:
            compile(block.text, block.where, "exec")
        elif block.title:
            load_plugins([Path(block.title)])
        else:
            exec(compile(block.text, block.where, "exec"), self._names)

    def _toml(self, block: Block) -> None:
        tables = tomllib.loads(block.text)
        if "axes" in tables:
            load_study(block.title)
        elif tables.keys() & {"policy", "peers"}:
            peers = dict.fromkeys(tables.get("peers", {}), "0" * 64)  # a page shortens them
            SiteConfig.model_validate({"name": "a", "data": "rows", **tables, "peers": peers})
        elif "project" not in tables:
            try:
                parse_config(tables)
            except FeditError as error:
                pytest.fail(f"{block.where}: {error}")


WITH_BLOCKS = [page for page in PAGES if any(True for _ in read_blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_every_block_of_a_page_runs(page: Path, page_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shown = Page(monkeypatch)
    blocks = list(read_blocks(page))
    for block in blocks:
        if block.title:
            Path(block.title).parent.mkdir(parents=True, exist_ok=True)
            Path(block.title).write_text(block.text, encoding="utf-8")
    for seed, name in enumerate(runs_taken_for_granted(blocks)):
        assert status_of(["run", "--out", f"runs/{name}", "--seed", str(seed)]) == 0
    for block in blocks:
        shown.run(block)


def runs_taken_for_granted(blocks: Sequence[Block]) -> list[str]:
    """Return the runs that blocks name and that no ``--out`` of theirs makes, those of another seed among them."""
    texts = [text for block in blocks for text in (block.text, *(mark.text for mark in block.marks))]
    named = dict.fromkeys(name for text in texts for name in re.findall(r"\bruns/([\w-]+)", text))
    made = {name for text in texts for name in re.findall(r"""(?:--out |folder=")runs/([\w-]+)""", text)}
    return [name for name in named if name not in made]


def fedit_commands() -> Iterator[tuple[Block, str, list[str]]]:
    """Yield every command of fedit in all blocks, with its arguments."""
    for page in PAGES:
        for block in read_blocks(page):
            for command in block.commands() if block.language in SHELL and not block.title else ():
                for each in split(command):
                    if (arguments := fedit_arguments(each)) is not None:
                        yield block, command, arguments


def test_commands_that_are_not_run_are_parsed_and_few() -> None:
    unrun: dict[str, str] = {}
    total = 0
    for block, command, arguments in fedit_commands():
        total += 1
        assert_parses(arguments, block.where)
        if (reason := block.marked("not run", command)) is not None:
            assert len(reason.split()) > 1, f"{block.where}: say why it is not run"
            unrun[f"{block.where}: {command}"] = reason
        elif (file := block.marked("run by", command)) is not None:
            assert_run_by(REPOSITORY / file, block, arguments)
    assert total > 30
    assert len(unrun) <= MAX_UNRUN * total, f"{len(unrun)} of {total} commands are marked as not run: {unrun}"


def assert_run_by(test: Path, block: Block, arguments: list[str]) -> None:
    """The test reads the page, or says the command's words and options itself."""
    assert test.is_file(), f"{block.where}: there is no {test}"
    text = test.read_text(encoding="utf-8")
    names, _, _ = cli.app.parse_commands(arguments)
    said = [*names, *(word for word in arguments if word.startswith("--"))]
    missing = [word for word in said if f'"{word}"' not in text]
    assert block.page.name in text or not missing, f"{block.where}: {test.name} does not say {missing}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPOSITORY)))
def test_commands_in_the_prose_exist(page: Path) -> None:
    for command in mentioned(page):
        words = command.split()[1:]
        names, apps, _ = cli.app.parse_commands(words)
        assert names, f"{page.name}: `{command}`: fedit has no command {words[0]!r}"
        options = {name for argument in apps[-1].assemble_argument_collection() for name in argument.names}
        for word in words:
            option = word.partition("=")[0]
            if re.fullmatch(r"--?[a-z][a-z-]*", option):
                assert option in options, f"{page.name}: `{command}`: no option {option}"


def test_marks_are_above_blocks() -> None:
    """A mark that no block follows would do nothing."""
    for page in PAGES:
        written = len(
            re.findall(r"^ *<!--\s*(?:not run|run by|first)\b", page.read_text(encoding="utf-8"), re.MULTILINE)
        )
        assert written == sum(len(block.marks) for block in read_blocks(page)), page
