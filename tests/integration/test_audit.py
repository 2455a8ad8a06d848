"""The audit of runs, from the command line to the report."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fedit import privacy
from fedit.audit import canaries, mechanism, membership
from fedit.audit.canaries import audit_canaries
from fedit.audit.membership import Rows
from fedit.audit.subject import Setting, Subject, with_privacy
from fedit.config import load_config

RUN = ("-o", "evaluation.baselines=false", "-o", "evaluation.max_new_tokens=0", "-o", "data.max_length=128")


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mechanism, "NUM_RUNS", 2)
    monkeypatch.setattr(mechanism, "NUM_CANARIES", 256)
    monkeypatch.setattr(canaries, "NUM_SECRETS", 16)
    monkeypatch.setattr(canaries, "NUM_EACH", 2)


@pytest.fixture
def run(fedit, recipe, tmp_path) -> Path:
    done = fedit("run", recipe, "--out", tmp_path / "run", *RUN)
    assert done.status == 0, done.stderr
    return tmp_path / "run"


@pytest.mark.slow
def test_a_finished_run_is_audited_and_its_report_says_so(fedit, run: Path) -> None:
    done = fedit("audit", run, "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((run / "audit.json").read_text()) == found
    assert found["violations"] == []
    assert list(found["labels"]) == ["none", "central", "dp-sgd", "local"]
    assert [each["setting"] for each in found["mechanisms"]] == ["central", "dp-sgd", "local"]
    assert all(each["holds"] for each in found["mechanisms"])
    assert [each["setting"] for each in found["canaries"]] == list(found["labels"])
    assert {each["seen"] for each in found["updates"]} == {"one update", "the sum", "the noisy sum"}
    step = [each["recovered"] for each in found["updates"] if each["setting"] == "none" and each["steps"] == 1]
    assert step[-2]["recall"] > 2 * step[-2]["blind"]  # one client's
    assert found["membership"]["num_rows"] == 4
    page = (run / "report.html").read_text()
    assert "What leaks" in page
    assert "leaked-tokens" in page
    assert "this run" in done.stderr
    again = fedit("audit", run, "--json")
    assert json.loads(again.stdout) == found


def test_a_run_that_breaks_its_promise_ends_with_status_1(fedit, recipe, tmp_path, monkeypatch) -> None:
    out = tmp_path / "run"
    more = ["privacy.noise_multiplier=1", "privacy.delta=0.01", "cohort.sampling=poisson", "cohort.fraction=0.9"]
    more += ["aggregation.name=fedit", "aggregation.weighting=uniform", "rounds=1"]
    done = fedit("run", recipe, "--out", out, *RUN, *(part for each in more for part in ("-o", each)))
    assert done.status == 0, done.stderr
    mean = privacy.Mechanism.mean

    def half(self, adapter, shapes, updates, clip_norm, noise):
        return mean(self, adapter, shapes, updates, clip_norm, lambda shape: noise(shape) / 2)

    monkeypatch.setattr(privacy.Mechanism, "mean", half)
    done = fedit("audit", out)
    assert done.status == 1
    assert "A promise is broken" in done.stderr
    assert "1 are promised" in done.stderr
    assert "a promise is broken" in (out / "report.html").read_text()


def test_rules_that_leave_no_model_for_all_are_audited_by_their_updates(fedit, recipe, tmp_path) -> None:
    out = tmp_path / "run"
    done = fedit("run", recipe, "--out", out, *RUN, "-o", "aggregation.name=fedsa-lora")
    assert done.status == 0, done.stderr
    done = fedit("audit", out, "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["membership"] is None
    assert found["canaries"] == []
    assert found["updates"]
    assert "no model for all" in found["refused"]["the final model"]


# ------------------------------------------------------------------------------------------------- what is refused


def test_what_cannot_be_audited_is_refused(fedit, recipe, data, run: Path, tmp_path) -> None:
    done = fedit("audit", tmp_path)
    assert done.status == 1
    assert "holds no config.json" in done.stderr
    rows = data.read_text()
    data.write_text(rows.replace("ab 1 a?", "ab 9 a?"))
    done = fedit("audit", run)
    assert done.status == 1
    assert "was trained on other rows" in done.stderr
    data.write_text(rows)
    evaluation = (run / "evaluation.json").read_text()
    (run / "evaluation.json").unlink()
    done = fedit("audit", run)
    assert done.status == 1
    assert "2 of 2 rounds are done" in done.stderr
    assert "fedit run --resume" in done.stderr
    (run / "evaluation.json").write_text(evaluation)
    described = json.loads((run / "config.json").read_text())
    described["model"]["weights_sha256"] = "0" * 64
    (run / "config.json").write_text(json.dumps(described))
    done = fedit("audit", run)
    assert done.status == 1
    assert "base of other weights" in done.stderr
    partition = json.loads((run / "partition.json").read_text())
    del partition["fingerprint"]
    (run / "partition.json").write_text(json.dumps(partition))
    done = fedit("audit", run)
    assert done.status == 1
    assert "real sites" in done.stderr


# ---------------------------------------------------------------------------------------- with and without a defence


@pytest.mark.slow
def test_canaries_are_memorised_without_noise_and_not_with_it(fedit, recipe, tmp_path, monkeypatch) -> None:
    """On the built-in base, one client beside those with canaries, many steps."""
    monkeypatch.setattr(canaries, "NUM_SECRETS", 32)
    monkeypatch.setattr(canaries, "NUM_EACH", 4)
    monkeypatch.setattr(canaries, "NUM_COINS", 48)
    options = ["partition.num_clients=2", "rounds=1", "client.local_steps=2", "aggregation.weighting=uniform"]
    out = tmp_path / "run"
    done = fedit("run", "default", "--out", out, *RUN[:4], *(part for each in options for part in ("-o", each)))
    assert done.status == 0, done.stderr
    config = load_config("default", [*options, "evaluation.baselines=false", "evaluation.max_new_tokens=0"])
    subject = Subject.open(out, config)
    client = config.client.model_copy(update={"local_steps": 60, "batch_size": 8})
    hard = config.model_copy(update={"client": client})
    quiet = with_privacy(hard, {"mechanism": "local", "noise_multiplier": 50.0, "clip_norm": 0.5, "delta": 1e-5})
    monkeypatch.setattr(membership, "MOST_ROWS", 50)
    rows = Rows(subject.model, subject.data.pooled, subject.data.test, 0)
    plain, noisy = audit_canaries(subject, [Setting("none", "plain", hard), Setting("local", "noisy", quiet)], 2, rows)
    assert plain.highest == 5
    assert plain.exposure[16] > 4
    assert plain.exposure[0] < 3
    assert noisy.exposure[0] < 3
    assert plain.update_exposure is not None
    assert plain.update_exposure[16] > 3
    assert plain.update_coin_auc is not None
    assert plain.update_coin_auc > 0.65
    assert noisy.update_coin_auc is not None
    assert abs(noisy.update_coin_auc - 0.5) < 0.25
    assert noisy.exposure[16] < 3
    assert noisy.epsilon is not None
    assert noisy.empirical.epsilon <= noisy.epsilon
    assert noisy.holds
    assert np.isfinite([plain.membership.auc, noisy.membership.auc]).all()
