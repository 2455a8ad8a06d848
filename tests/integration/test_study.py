"""A study: every combination with every seed, compared with the right baselines; what was done is not done again."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest

STUDY = """
recipe = "{recipe}"
seeds = [0, 1]
[override]
rounds = 1
"evaluation.max_new_tokens" = 0
[axes.split]
iid = {{}}
shards = {{ "partition.name" = "category_shards", "partition.num_clients" = 3, "partition.shards_per_client" = 1 }}
[axes.rule]
fedit = {{ "aggregation.name" = "fedit" }}
ffa-lora = {{ "aggregation.name" = "ffa-lora" }}
[reference]
rule = "fedit"
"""


@pytest.fixture
def study(tmp_path: Path, recipe: Path) -> Path:
    path = tmp_path / "grid.toml"
    path.write_text(STUDY.format(recipe=recipe))
    return path


def runs_of(folder: Path) -> list[dict[str, Any]]:
    return json.loads((folder / "study.json").read_text())["runs"]


def test_a_grid_its_table_and_how_it_grows(fedit, study, tmp_path) -> None:
    """The second time there is a new seed; one run is unfinished, and of one only study.json knows."""
    out = tmp_path / "out"
    study.write_text(study.read_text().replace("[0, 1]", "[0]"))
    done = fedit("study", study, "--out", out, "--jobs", "2")
    assert done.status == 0, done.stderr
    first = runs_of(out)
    assert len(first) == 4
    untouched = out / "runs" / "iid" / "fedit" / "0" / "rounds.jsonl"
    before = untouched.stat().st_mtime_ns
    shutil.rmtree(out / "runs" / "shards" / "fedit" / "0")
    (out / "runs" / "iid" / "ffa-lora" / "0" / "evaluation.json").unlink()
    content = json.loads((out / "study.json").read_text())
    content["runs"] = [run for run in first if run["choices"] != {"split": "iid", "rule": "ffa-lora"}]
    (out / "study.json").write_text(json.dumps(content))

    study.write_text(study.read_text().replace("[0]", "[0, 1]"))
    done = fedit("study", study, "--out", out, "--jobs", "2")
    assert done.status == 0, done.stderr
    assert untouched.stat().st_mtime_ns == before
    assert not (out / "runs" / "shards" / "fedit" / "0").exists()
    runs = runs_of(out)
    assert {(*run["choices"].values(), run["seed"]) for run in runs} == {
        (split, rule, seed) for split in ("iid", "shards") for rule in ("fedit", "ffa-lora") for seed in (0, 1)
    }
    assert by_label([run for run in runs if run["seed"] == 0]) == by_label(first)
    for run in runs:
        check_measures(run, runs, out.joinpath("runs", *run["choices"].values(), str(run["seed"])))
    lines = (out / "study.md").read_text().splitlines()
    table = [line.strip("| \n").split(" | ") for line in lines if line.startswith("|")]
    assert table[0][:4] == ["split", "rule", "Seeds", "Response loss"]
    assert [line[:3] for line in table[2:6]] == [
        [split, rule, "2"] for split in ("iid", "shards") for rule in ("fedit", "ffa-lora")
    ]
    assert [line[:3] for line in table[6:]] == [
        [split, model, "2"] for split in ("iid", "shards") for model in ("Base", "Local-only", "Centralised")
    ]
    losses = [run["response_loss"] for run in runs if run["choices"] == {"split": "shards", "rule": "ffa-lora"}]
    assert table[5][3] == f"{statistics.fmean(losses):.3f} ± {statistics.stdev(losses):.3f}"

    check_that_nothing_but_links_needs_the_runs(fedit, study, out)
    check_that_results_outlive_their_place_in_the_study(fedit, study, out)
    damaged = (out / "study.json").read_text()
    (out / "study.json").write_text(damaged[:-2] + ",}")
    refused = fedit("study", study, "--out", out)
    assert refused.status == 1
    assert "study.json is damaged" in refused.stderr
    (out / "study.json").write_text(damaged)
    study.write_text(study.read_text().replace("rounds = 1", "rounds = 2"))
    refused = fedit("study", study, "--out", out)
    assert refused.status == 1
    assert "another configuration" in refused.stderr


def check_that_results_outlive_their_place_in_the_study(fedit, study: Path, out: Path) -> None:
    """A seed leaves the study and comes back, without its runs' folders."""
    before = runs_of(out)
    study.write_text(study.read_text().replace("[0, 1]", "[0]"))
    assert fedit("study", study, "--out", out).status == 0
    assert sorted(runs_of(out), key=str) == sorted(before, key=str)
    study.write_text(study.read_text().replace("[0]", "[0, 1]"))
    assert fedit("study", study, "--out", out).status == 0
    assert {run["seed"] for run in runs_of(out)} == {0, 1}
    assert not (out / "runs").exists()


def by_label(runs: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {str(run["choices"]): {k: v for k, v in run.items() if k != "aggregation_s"} for run in runs}


def check_measures(run: dict[str, Any], runs: list[dict[str, Any]], folder: Path) -> None:
    alike = {**run["choices"], "rule": "fedit"}
    reference = next(other for other in runs if other["choices"] == alike and other["seed"] == run["seed"])
    if reference is run:
        assert "difference" not in run
    else:
        assert run["difference"] == run["response_loss"] - reference["response_loss"]
    gap = reference["local"] - reference["central"]
    assert ("gap_closed" in run) == (gap > 0)
    if gap > 0:
        assert run["gap_closed"] == pytest.approx((reference["local"] - run["response_loss"]) / gap)
    assert run["aggregation_s"] > 0
    if folder.exists():
        evaluation = json.loads((folder / "evaluation.json").read_text())
        assert ("local" in evaluation["models"]) == (run["choices"]["rule"] == "fedit")
        assert run["response_loss"] == evaluation["models"]["federated"]["response_loss"]["all"]
        lines = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        assert run["bytes_up"] == sum(line["bytes_up"] for line in lines) / 3


def check_that_nothing_but_links_needs_the_runs(fedit, study: Path, out: Path) -> None:
    """With study.json alone: the intervals of answers that are gone are those that were found when they were there."""
    names = ("study.md", "study.csv", "study.tex", "study.json")
    before = {name: (out / name).read_text() for name in names}
    page = (out / "study.html").read_text()
    assert "runs/shards/ffa-lora/1/report.html" in page
    for answers in (out / "runs").rglob("answers.jsonl"):
        answers.unlink()
    assert fedit("study", study, "--out", out).status == 0
    assert {name: (out / name).read_text() for name in names} == before
    shutil.rmtree(out / "runs")
    for name in names[:-1]:
        (out / name).unlink()
    done = fedit("study", study, "--out", out, "--json")
    assert done.status == 0, done.stderr
    assert {name: (out / name).read_text() for name in names} == before
    after = (out / "study.html").read_text()
    assert "report.html" not in after
    assert re.findall(r"<(?:path|svg|code)[^>]*>", after) == re.findall(r"<(?:path|svg|code)[^>]*>", page)
    groups = {group["label"]: group for group in json.loads(done.stdout)["groups"]}
    assert groups["iid · ffa-lora"]["reference"] == "iid · fedit"
    found = groups["iid · ffa-lora"]["metrics"]["response_loss"]
    assert found["interval"][0] < found["mean"] < found["interval"][1]
    # Of one seed the answers were gone before the other one came.
    assert groups["shards · ffa-lora"]["metrics"]["response_loss"]["interval"] is None
    assert groups["shards · ffa-lora"]["notes"] == ["no interval, for answers are gone (seed 0, 1)"]


def test_a_run_that_fails_takes_no_other_with_it(fedit, study, tmp_path) -> None:
    wild = 'wild = { "client.learning_rate" = 1e30 }'
    text = study.read_text().replace('ffa-lora = { "aggregation.name" = "ffa-lora" }', wild)
    study.write_text(text.replace("[0, 1]", "[0]").replace("iid = {}\n", ""))
    done = fedit("study", study, "--out", tmp_path / "out")
    assert done.status == 1
    assert "1 of 2 runs failed" in done.stderr
    assert {run["choices"]["rule"] for run in runs_of(tmp_path / "out")} == {"fedit"}


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('rule = "fedit"', 'rule = "fedti"', "no choice is named 'fedti'. Did you mean 'fedit'?"),
        ('rule = "fedit"', 'rul = "fedit"', "no axis is named 'rul'. Did you mean 'rule'?"),
        ("seeds", "sedes", "unknown key 'sedes'. Did you mean 'seeds'?"),
        ('"aggregation.name" = "ffa-lora"', '"aggregation.name" = "ffa"', "In the study's run iid · ffa-lora"),
        ("rounds = 1", "rounds = ", "is not valid TOML"),
        ("[0, 1]", "[0, 0]", "a seed is named twice"),
        ('"evaluation.max_new_tokens"', "evaluation.max_new_tokens", 'Quote the key: "evaluation.max_new_tokens"'),
    ],
)
def test_a_study_is_checked_before_anything_runs(fedit, study, tmp_path, old: str, new: str, message: str) -> None:
    study.write_text(study.read_text().replace(old, new))
    done = fedit("study", study, "--out", tmp_path / "out")
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_no_jobs(fedit, study, tmp_path) -> None:
    done = fedit("study", study, "--out", tmp_path / "out", "--jobs", "0")
    assert done.status == 1
    assert "--jobs 0: expected 1 or more" in done.stderr


def test_unknown_study(fedit) -> None:
    done = fedit("study", "rulse")
    assert done.status == 1
    assert "Did you mean 'rules'?" in done.stderr
