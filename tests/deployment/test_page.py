"""The commands of the page on real sites, each as its reader gives it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from federations import RECIPE, fedit, free_port, write_rows
from pages import REPOSITORY, read_blocks, split

from fedit.federation import federation_status
from fedit.report import RunFolder

ENGINE = "nvflare"
"""The one that the page takes; the other tests here are behind each"""
PAGE = REPOSITORY / "docs" / "how-to" / "federation.md"


def commands_of_page() -> dict[str, list[str]]:
    """Return the arguments of the page's commands by their first two words, with an address of this machine."""
    found: dict[str, list[str]] = {}
    local = {"--host": "localhost", "--port": str(free_port())}
    for block in read_blocks(PAGE):
        for line in block.commands() if block.language == "bash" else ():
            for command in split(line):
                before = ["", *command.words]
                words = [local.get(option, word) for option, word in zip(before, command.words, strict=False)]
                if words[0] == "fedit":
                    found[" ".join(words[1:3])] = words[1:]
    return found


@contextmanager
def started(arguments: list[str], folder: Path) -> Iterator[None]:
    """Run a command in `folder` until it is interrupted."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with (folder / "out.txt").open("ab") as output:
        command = [sys.executable, "-m", "fedit.cli", *arguments]
        process = subprocess.Popen(command, cwd=folder, stdout=output, stderr=output, env=environment)
    try:
        yield
    finally:
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0, arguments


def wait(until: Callable[[], bool], timeout_s: float = 120) -> None:
    end = time.monotonic() + timeout_s
    while not until():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.5)


def test_the_commands_of_the_page(
    tmp_path: Path, tiny_model_folder: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows lie where a site's folder says from the start."""
    monkeypatch.chdir(tmp_path)
    page = commands_of_page()
    rows = write_rows(tmp_path)
    recipe = RECIPE.format(model=tiny_model_folder, data=rows, test=tmp_path / "test.jsonl")
    held_out = f'test_path = "{tmp_path / "test.jsonl"}"'
    (tmp_path / "recipe.toml").write_text(recipe.replace(held_out, "test_per_category = 1"))
    fedit(*page["federation init"])
    server, sites = tmp_path / "hospitals" / "server", sorted((tmp_path / "hospitals" / "sites").iterdir())
    assert [site.name for site in sites] == ["north", "south", "west"]
    with ExitStack() as running:
        running.enter_context(started(page["federation serve"], tmp_path))
        for site, own in zip(sites, "abc", strict=True):
            shutil.copy(rows / f"{own}.jsonl", site / "rows.jsonl")
            start = [site.name if word == "north" else word for word in page["site start"]]
            running.enter_context(started(start, site.parent))
        wait(lambda: all(site["connected"] for site in federation_status(server)["sites"].values()))
        checked = fedit(*page["federation check"]).stderr
        assert "is not ready" not in checked
        assert all(site.name in checked for site in sites)
        fedit(*page["federation run"])
        with started(page["federation status"], tmp_path):
            wait(lambda: "3 of 3 rounds" in (tmp_path / "out.txt").read_text())
    run = RunFolder.read(tmp_path / "runs" / "recipe")
    assert len(run.rounds) == 3
    assert not any(line["failures"] for line in run.rounds)
    assert (run.path / "report.html").is_file()
    monkeypatch.chdir(sites[0].parent)
    assert "asked to train" in fedit(*page["site log"]).stderr
