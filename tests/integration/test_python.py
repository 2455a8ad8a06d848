"""The experiment from Python, and the examples."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

import fedit as library
from fedit.config import load_config
from fedit.interfaces import ConfigError

SAME = ("config.json", "partition.json", "rounds.jsonl", "evaluation.json", "adapter/adapter_model.safetensors")


def assert_same(one: Path, other: Path) -> None:
    for name in SAME:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


def test_run_gives_what_the_command_gives(fedit, recipe: Path, tmp_path: Path) -> None:
    events: list[library.PhaseStarted | library.Progressed | library.RoundFinished] = []
    run = library.run(recipe, ["rounds=3", "aggregation.name=flexlora"], notify=events.append)
    assert run.path == Path("runs/recipe")
    done = fedit("run", recipe, "-o", "rounds=3", "-o", "aggregation.name=flexlora", "--out", tmp_path / "command")
    assert done.status == 0
    assert_same(run.path, tmp_path / "command")
    rounds = [event.record.round for event in events if isinstance(event, library.RoundFinished)]
    phases = [event.phase for event in events if isinstance(event, library.PhaseStarted)]
    assert rounds == [line["round"] for line in run.rounds] == [1, 2, 3]
    assert phases == ["federated", "local", "central", "evaluation"]


def test_the_same_call_goes_on_where_it_was_interrupted(fedit, recipe: Path, tmp_path: Path) -> None:
    whole = library.run(recipe, folder=tmp_path / "whole")
    config = load_config(str(recipe))

    def interrupt(event: Any) -> None:
        if isinstance(event, library.RoundFinished):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        library.run(config, folder=tmp_path / "run", notify=interrupt, resume=True)
    with pytest.raises(ConfigError, match="holds a run already"):
        library.run(config, folder=tmp_path / "run")
    run = library.run(config, folder=str(tmp_path / "run"), resume=True)
    assert run.rounds == whole.rounds
    assert run.evaluation == whole.evaluation
    events: list[Any] = []
    again = library.run(config, folder=run.path, resume=True, notify=events.append)
    assert again.evaluation == run.evaluation
    assert {type(event) for event in events} == {library.PhaseStarted}, "nothing is done again"
    with pytest.raises(ConfigError, match="another configuration"):
        library.run(recipe, ["rounds=5"], folder=run.path, resume=True)


def test_a_run_goes_on_in_a_folder(recipe: Path) -> None:
    with pytest.raises(ConfigError, match="name it, folder="):
        library.run(recipe, resume=True)


def test_overrides_are_for_recipes(fedit, recipe: Path) -> None:
    with pytest.raises(ConfigError, match="load_config"):
        library.run(load_config(str(recipe)), ["rounds=1"])


def test_a_notebook_shows_the_table_and_models_answer(fedit, recipe: Path) -> None:
    run = library.run(recipe)
    loss = run.evaluation["models"]["federated"]["response_loss"]["all"]
    assert f"{loss:.3f}" in run._repr_html_()
    assert repr(run) == "RunFolder.read('runs/recipe')"
    models = library.RunModels.open(str(run.path), ["base", "federated"])
    answers = models.ask("ab 1 a?", max_new_tokens=4)
    assert list(answers) == ["base", "federated"]
    assert answers == models.ask("ab 1 a?", max_new_tokens=4)
    with pytest.raises(ConfigError, match="personal"):
        library.RunModels.open(run.path, ["personal/a"])
    assert library.RunFolder.read(str(run.path)).rounds == run.rounds


# ---------------------------------------------------------------------------------------------------------- examples


def test_a_script_that_defines_a_rule_is_its_plug_in_file(
    repository: Path, recipe: Path, tmp_path: Path, registry: dict[str, Any]
) -> None:
    """The command line reads the run, whose rule is in the script."""
    script = repository / "examples" / "own_rule.py"
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, script, recipe], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shipped, own = done.stdout.splitlines()
    assert shipped.startswith("fedit: held-out loss ")
    assert own.startswith("sign-election: held-out loss ")
    run = library.RunFolder.read(tmp_path / "runs" / "recipe-2")
    assert run.config["plugin_files"] == [str(script)]
    assert run.run["aggregation"]["name"] == "sign-election"
    assert library.RunModels.open(run.path).ask("ab 1 a?", max_new_tokens=2).keys() == {"federated"}


@pytest.mark.slow
def test_the_notebook_runs(repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one round in place of its parameter; a cell that raises fails."""
    monkeypatch.delenv("MPLBACKEND", raising=False)  # the kernel's own shows figures
    notebook = nbformat.read(repository / "examples" / "first_federation.ipynb", nbformat.NO_CONVERT)
    nbformat.validate(notebook)
    assert [cell for cell in notebook.cells if cell.get("outputs")] == [], "outputs are not stored"
    (parameters,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    assert parameters.source == "rounds = 6"
    parameters.source = "rounds = 1"
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": tmp_path}}).execute()
    shown = {cell["id"]: cell.get("outputs", []) for cell in notebook.cells}
    assert len(shown["result"]) == 1
    assert "Federated" in shown["result"][0]["data"]["text/html"]
    assert any("image/png" in output.get("data", {}) for output in shown["plot"])
    texts = {name: "".join(output.get("text", "") for output in outputs) for name, outputs in shown.items()}
    assert "round 1 of 1: loss " in texts["train"]
    assert "federated" in texts["answers"]
    assert texts["peft"].strip()
