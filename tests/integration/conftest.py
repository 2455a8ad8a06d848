"""The command line in this process, on a tiny model and tiny data."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedit import cli

RECIPE = """
rounds = 2
[model]
path = "{model}"
dtype = "float32"
[adapter]
rank = 2
alpha = 4
[data]
path = "{data}"
test_per_category = 2
template = "plain"
[partition]
name = "iid"
num_clients = 3
[client]
local_steps = 2
batch_size = 3
learning_rate = 1e-2
[evaluation]
max_new_tokens = 3
[engine]
device = "cpu"
"""


@dataclass(frozen=True)
class Finished:
    """How a command ended."""

    status: int
    stdout: str
    stderr: str


Fedit = Callable[..., Finished]


@pytest.fixture
def fedit(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Fedit:
    """Run ``fedit <arguments>`` as the console script does, in an empty folder."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(*arguments: str | Path) -> Finished:
        capsys.readouterr()
        status = 0
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Finished(status, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def asked_run(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, rows: list[dict[str, str]]) -> Path:
    """A finished run with baselines, whose models are asked; nothing is written to it."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "recipe.toml").write_text(RECIPE.format(model=tiny_model_folder, data=folder / "rows.jsonl"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["run", str(folder / "recipe.toml"), "--out", str(folder / "run")])
    return folder / "run"


@pytest.fixture(scope="session")
def rows() -> list[dict[str, str]]:
    """24 rows of 2 categories and 3 clients; the last client's responses end with a tilde."""
    return [
        {
            "instruction": f"{word} {number} {client}?",
            "response": word[::-1] + ("~" if client == "c" else ""),
            "category": word,
            "client": client,
        }
        for word in ("ab", "cde")
        for number in range(4)
        for client in "abc"
    ]


@pytest.fixture
def data(tmp_path: Path, rows: list[dict[str, str]]) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def recipe(tmp_path: Path, tiny_model_folder: Path, data: Path) -> Path:
    path = tmp_path / "recipe.toml"
    path.write_text(RECIPE.format(model=tiny_model_folder, data=data))
    return path
