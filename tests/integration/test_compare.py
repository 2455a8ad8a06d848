"""`fedit compare` on runs of two rules and two seeds, and the command that each of them is said to come from."""

from __future__ import annotations

import csv
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from fedit.report import RunFolder


@pytest.fixture
def runs(fedit, recipe: Path) -> list[Path]:
    """Two seeds of two rules, the first of them with baselines; relative, as a user names them."""
    folders = []
    for rule, keys in (
        ("fedit", ()),
        ("ffa-lora", ("-o", "evaluation.baselines=false", "-o", "aggregation.name=ffa-lora")),
    ):
        for seed in ("0", "1"):
            folders.append(Path(f"{rule}-{seed}"))
            done = fedit("run", recipe, *keys, "--seed", seed, "--out", folders[-1])
            assert done.status == 0, done.stderr
    return folders


def test_runs_beside_each_other(fedit, runs, tmp_path) -> None:
    done = fedit("compare", *runs, "--json")
    assert done.status == 0, done.stderr
    assert "ffa-lora" in done.stderr
    result = json.loads(done.stdout)
    assert [(group["label"], group["model"], group["seeds"]) for group in result["groups"]] == [
        ("aggregation.name=fedit", "federated", [0, 1]),
        ("aggregation.name=ffa-lora", "federated", [0, 1]),
        ("Base", "base", [0, 1]),
        ("Local-only", "local", [0, 1]),
        ("Centralised", "central", [0, 1]),
    ]
    evaluations = [RunFolder.read(folder).evaluation["models"] for folder in runs]
    federated = [models["federated"] for models in evaluations]
    for metric in ("response_loss", "exact_match", "rouge_l"):
        found = result["groups"][1]["metrics"][metric]
        assert found["by_seed"] == [
            federated[2 + seed][metric]["all"] - federated[seed][metric]["all"] for seed in (0, 1)
        ]
        assert found["interval"][0] <= found["mean"] <= found["interval"][1]
    local = result["groups"][3]["metrics"]["response_loss"]["by_seed"][0]
    assert local == evaluations[0]["local"]["response_loss"]["all"] - federated[0]["response_loss"]["all"]
    lines = list(csv.DictReader(Path("comparison/compare.csv").read_text(encoding="utf-8").splitlines()))
    assert [(line["aggregation.name"], line["seed"]) for line in lines] == [
        ("fedit", "0"), ("fedit", "1"), ("ffa-lora", "0"), ("ffa-lora", "1")
    ]  # fmt: skip
    assert [float(line["response_loss"]) for line in lines] == [model["response_loss"]["all"] for model in federated]
    page = Path("comparison/compare.html").read_text(encoding="utf-8")
    for link in re.findall(r'href="([^#"][^"]*)"', page):
        assert Path("comparison", link).is_file(), link
    assert page.count("report.html") == 2 * 4 + 3 * 2
    assert "\\toprule" in Path("comparison/compare.tex").read_text(encoding="utf-8")

    command = lines[2]["command"]
    assert command in Path("comparison/compare.tex").read_text(encoding="utf-8")
    again = fedit(*shlex.split(command)[1:], "--out", "again")
    assert again.status == 0, again.stderr
    assert Path("again/rounds.jsonl").read_bytes() == (runs[2] / "rounds.jsonl").read_bytes()
    done = fedit("compare", runs[0], runs[2], "again")
    assert done.status == 1
    assert "again and ffa-lora-0 are runs of the same configuration and seed" in " ".join(done.stderr.split())

    (runs[0] / "evaluation.json").unlink()
    for folders, message in (
        (runs, "fedit-0 is not evaluated: 2 of 2 rounds are done. Go on with `fedit run --resume fedit-0`"),
        ([runs[1], runs[1]], "fedit-1 is given twice"),
        ([runs[1], tmp_path], "is not a run: it holds no config.json"),
        ([runs[1], "nowhere"], "nowhere is not a run: it is no folder"),
    ):
        refused = fedit("compare", *folders, "--out", "refused")
        assert refused.status == 1
        assert message in " ".join(refused.stderr.split())
        assert not Path("refused").exists()


def test_other_rows_and_seeds_are_said_and_not_paired(fedit, runs, recipe) -> None:
    done = fedit("run", recipe, "-o", "data.test_per_category=1", "-o", "evaluation.baselines=false", "--out", "rows")
    assert done.status == 0, done.stderr
    shutil.rmtree(runs[2])
    done = fedit("compare", *runs[:2], runs[3], "rows", "--out", "out", "--json")
    assert done.status == 0, done.stderr
    result = {group["label"]: group for group in json.loads(done.stdout)["groups"]}
    rows = result["aggregation.name=fedit, data.test_per_category=1"]
    assert (rows["metrics"], rows["notes"]) == ({}, ["other test rows (seed 0)"])
    ffa = result["aggregation.name=ffa-lora, data.test_per_category=2"]
    assert ffa["metrics"]["response_loss"]["seeds"] == [1]
    assert ffa["metrics"]["response_loss"]["deviation"] is None
    assert "Difference, other test rows (seed 0)" in Path("out/compare.html").read_text(encoding="utf-8")
