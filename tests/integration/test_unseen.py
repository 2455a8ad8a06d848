"""Clients and categories that no model of a run is trained on, and that all are measured on."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedit.config import parse_config
from fedit.evaluation.heldout import response_losses
from fedit.prepare import FederatedData, prepare_data
from fedit.report import RunFolder
from fedit.run_models import RunModels


def prepared(folder: Path) -> FederatedData:
    return prepare_data(parse_config(RunFolder.read(folder).run))


def test_unseen_clients_take_no_part_and_are_measured(fedit, recipe, tmp_path) -> None:
    folder = tmp_path / "run"
    options = ["partition.num_clients=5", "evaluation.unseen_clients=0.4"]
    done = fedit("run", recipe, "--out", folder, *[part for option in options for part in ("-o", option)])
    assert done.status == 0, done.stderr
    run = RunFolder.read(folder)
    unseen = set(run.partition["unseen_clients"])
    seen = set(run.partition["clients"])
    assert (len(seen), len(unseen)) == (3, 2)
    assert seen | unseen == set("01234")
    assert all(set(line["cohort"]) <= seen for line in run.rounds)
    assert set(run.evaluation["models"]["local"]["per_client"]) == seen

    data = prepared(folder)
    trained = {row.example.turns for row in data.pooled}
    measured = {client: [row.example.turns for row in rows] for client, rows in data.unseen.items()}
    assert not trained & {turns for rows in measured.values() for turns in rows}
    found = run.evaluation["unseen_clients"]
    assert found["num_test_rows"] == {"all": sum(map(len, measured.values()))} | {
        client: len(rows) for client, rows in measured.items()
    }
    models = RunModels.open(folder, ["base", "federated", "central"])
    for name, adapter in models.adapters.items():
        for client, rows in data.unseen.items():
            loss = response_losses(models.model, [adapter], rows).sum() / sum(row.num_supervised for row in rows)
            assert found["models"][name]["response_loss"][client] == pytest.approx(loss, rel=1e-6)
    assert f"unseen clients: Base {found['models']['base']['response_loss']['all']:.3f}, Local-only" in done.stderr
    assert list(found["models"]) == ["base", "local", "central", "federated"]
    assert "rows of unseen clients, whose rows no model was trained on" in (folder / "report.html").read_text()


def test_at_most_twenty_rows_of_an_unseen_client(fedit, recipe, tmp_path) -> None:
    rows = [{"instruction": f"{number}?", "response": "yes", "category": "ab"[number % 2]} for number in range(80)]
    path = tmp_path / "more.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = [f"data.path={path}", "partition.num_clients=2", "evaluation.unseen_clients=0.5", "rounds=1"]
    folder = tmp_path / "run"
    done = fedit("run", recipe, "--out", folder, *[part for option in options for part in ("-o", option)])
    assert done.status == 0, done.stderr
    assert list(RunFolder.read(folder).partition["unseen_clients"].values()) == [20]


def test_unseen_categories_are_in_the_test_only(fedit, recipe, tmp_path) -> None:
    folder = tmp_path / "run"
    done = fedit("run", recipe, "--out", folder, "-o", 'evaluation.unseen_categories=["ab"]')
    assert done.status == 0, done.stderr
    run = RunFolder.read(folder)
    data = prepared(folder)
    assert {row.example.category for row in data.pooled} == {"cde"}
    assert {row.example.category for row in data.test} == {"ab", "cde"}
    found = run.evaluation["unseen_categories"]
    assert set(found["num_test_rows"]) == {"all", "ab"}
    for name, measured in found["models"].items():
        assert measured["response_loss"]["all"] == run.evaluation["models"][name]["response_loss"]["ab"]
        assert np.isfinite(measured["response_loss"]["all"])
    assert "rows of unseen categories, whose rows no model was trained on: ab." in (folder / "report.html").read_text()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("evaluation.unseen_clients=0.1", "unseen_clients = 0.1 of 3 clients is nobody"),
        ("evaluation.unseen_clients=0.9", "unseen_clients = 0.9 of 3 clients is everybody"),
        ("evaluation.unseen_clients=1", "less than 1"),
        ('evaluation.unseen_categories=["abc"]', "no held-out row has the category 'abc'. Did you mean 'ab'?"),
        ('evaluation.unseen_categories=["ab", "cde"]', "no row is left to train on"),
    ],
)
def test_what_cannot_be_left_out_is_refused(fedit, recipe, option: str, message: str) -> None:
    done = fedit("check", recipe, "-o", option)
    assert done.status == 1
    assert message in done.stderr
