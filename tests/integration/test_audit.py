"""The audit of runs, from the command line to the report."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from fedit import privacy
from fedit.audit import canaries, folder, mechanism, membership
from fedit.audit.canaries import audit_canaries
from fedit.audit.folder import rows_of
from fedit.audit.subject import Setting, Subject, with_privacy
from fedit.config import load_config
from fedit.interfaces import EngineError

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
    step = [each["recovered"] for each in found["updates"] if each["setting"] == "none" and each["plain"]]
    assert step[-2]["recall"] > 2 * step[-2]["blind"]  # one client's
    assert found["membership"]["num_rows"] == 4
    page = (run / "report.html").read_text()
    assert "What leaks" in page
    assert "leaked-tokens" in page
    assert "this run" in done.stderr
    again = fedit("audit", run, "--json")
    assert json.loads(again.stdout) == found


def test_a_run_that_breaks_its_promise_ends_with_status_3(fedit, recipe, tmp_path, monkeypatch) -> None:
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
    assert done.status == 3
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
    assert all(each["first_round"] for each in found["updates"])
    assert "no model for all" in found["refused"]["the final model"]
    assert "factors of its own" in found["refused"]["tokens of the last round's updates"]
    assert "A gets no gradient" in found["refused"]["this run, tokens of one step of the first round"]


@pytest.mark.slow
def test_malicious_clients_and_cohorts_that_draw_few(fedit, recipe, tmp_path) -> None:
    """With canaries there are two clients more: the malicious ones stay, and who is not drawn is named."""
    out = tmp_path / "run"
    more = ["attack.name=sign-flip", "attack.clients=0.34", "cohort.size=2", "cohort.min_updates=2", "rounds=1"]
    done = fedit("run", recipe, "--out", out, *RUN, *(part for each in more for part in ("-o", each)))
    assert done.status == 0, done.stderr
    done = fedit("audit", out, "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    own = found["canaries"][0]
    assert own["setting"] == "none"
    assert sorted({each["setting"] for each in found["canaries"]}) == sorted(found["labels"])
    absent = [kind for kind, times in own["took_part"].items() if not times]
    assert absent  # one round draws two of five
    for kind in absent:
        assert "not drawn in any of 1 rounds" in found["refused"][f"this run, {kind} canaries"]
    assert (own["exposure"] is None) == ("copied" in absent)
    assert (own["coin_auc"] is None) == ("tossed" in absent)
    page = (out / "report.html").read_text()
    assert "Not audited: this run" in page


def test_what_fails_leaves_the_rest(fedit, run: Path, monkeypatch) -> None:
    """Canaries that are too long, a mechanism that cannot be attacked."""
    monkeypatch.setattr(canaries, "NUM_WORDS", 300)

    def fails(config, sizes):
        if config.privacy is not None and config.privacy.mechanism == "central":
            raise EngineError("cannot be attacked")

    monkeypatch.setattr(folder, "audit_mechanism", fails)
    done = fedit("audit", run, "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["refused"]["central, epsilon 8, the mechanism"] == "cannot be attacked"
    assert "longer than max_length" in found["refused"]["this run, canaries"]
    assert found["canaries"] == []
    assert found["updates"]
    assert found["membership"]["num_rows"] == 4


def test_amounts_along_random_directions_have_no_span(fedit, recipe, tmp_path) -> None:
    out = tmp_path / "run"
    options = ("-o", "aggregation.name=tinylora", "-o", "rounds=1")
    done = fedit("run", recipe, "--out", out, *RUN, *options)
    assert done.status == 0, done.stderr
    done = fedit("audit", out, "--json", "--rounds", "1")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["updates"] == []
    assert "shares no matrices" in found["refused"]["tokens of updates"]


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
    rows = functools.cache(lambda clients: rows_of(subject, clients))
    plain, noisy = audit_canaries(subject, [Setting("none", "plain", hard), Setting("local", "noisy", quiet)], 2, rows)
    assert plain.highest == 5
    assert plain.exposure is not None
    assert noisy.exposure is not None
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
