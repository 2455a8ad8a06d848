"""What leaks, from a made-up ``audit.json``: the page's sentences and tables, the terminal's lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.console import Console

from fedit.report import write_report
from fedit.report.leaks import leaks, leaks_table, roc_figure, tokens_figure


def make_recovered(recall: float, **changes: Any) -> dict[str, Any]:
    return {"num_tokens": 50, "recall": recall, "blind": 0.07, "guessed": 0.5, "unguessed_recall": 0.9,
            "unguessed_blind": None, **changes}  # fmt: skip


def make_update(setting: str, seen: str, steps: int, recall: float, *, first=False) -> dict[str, Any]:
    return {"setting": setting, "plain": steps == 1, "steps": steps, "seen": seen, "first_round": first,
            "num_updates": 1 if seen == "one update" else 8, "recovered": make_recovered(recall)}  # fmt: skip


MEMBERSHIP = {"num_rows": 320, "auc": 0.612, "auc_interval": [0.57, 0.65], "true_share": 0.031,
              "true_share_interval": [0.015, 0.057], "plain_auc": 0.55, "base_auc": 0.5, "base_interval": [0.45, 0.55],
              "curve": [[0, 0], [0.5, 0.6], [1, 1]]}  # fmt: skip


def make_canaries(setting: str, epsilon: float | None) -> dict[str, Any]:
    exposure = {"0": 1.2, "1": 1.9, "4": 3.3, "16": 5.7}
    return {"setting": setting, "rounds": 8, "took_part": {"copied": 5, "tossed": 3}, "highest": 7.0,
            "exposure": exposure, "update_exposure": None if setting == "central" else exposure, "coin_auc": 0.51,
            "update_coin_auc": 0.6, "empirical": {"epsilon": 0.4}, "epsilon": epsilon,
            "membership": MEMBERSHIP, "holds": True}  # fmt: skip


def make_audit(**changes: Any) -> dict[str, Any]:
    mechanism = {"setting": "central", "mechanism": "central", "noise_multiplier": 0.8, "found_noise": 0.87,
                 "epsilon": 7.9, "found_epsilon": 6.9, "one_run_epsilon": 2.0, "one_run_accountant": 7.8,
                 "holds": True}  # fmt: skip
    return {
        "rounds": 8,
        "labels": {"none": "this run", "central": "central, epsilon 8"},
        "mechanisms": [mechanism],
        "updates": [
            make_update("none", "one update", 1, 0.2, first=True),
            make_update("none", "one update", 1, 0.88),
            make_update("none", "the sum", 1, 0.71),
            make_update("none", "one update", 12, 0.29),
            make_update("none", "the sum", 12, 0.22),
            make_update("central", "the noisy sum", 1, 0.08),
        ],
        "membership": MEMBERSHIP,
        "canaries": [make_canaries("none", None), make_canaries("central", 8.0)],
        "refused": {"local, epsilon 8": "it needs <another> rule"},
        "violations": [],
        **changes,
    }


def test_the_page_says_who_learns_what(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 8}}))
    (tmp_path / "audit.json").write_text(json.dumps(make_audit()))
    page = write_report(tmp_path).read_text()
    assert "The server names 88% of the 50 tokens trained on (of noise: 7%; by their frequency elsewhere: 50%)" in page
    assert "29% of the 50 tokens" in page
    assert "Who sees nothing else names 71%" in page
    assert "AUC of 0.612 (0.570–0.650; 0.5 is a guess), 3.1% of them at 1% false alarms (1.5%–5.7%)" in page.replace(
        "1.5–5.7%", "1.5%–5.7%"
    )
    assert "an exposure of 5.7 of 7 bits; canaries that were never there have 1.2" in page
    assert "No promise was found broken" in page
    assert "it needs &lt;another&gt; rule" in page
    assert page.count("<svg") == 2


def test_a_broken_promise_comes_first(tmp_path: Path) -> None:
    broken = make_audit(violations=["this run, mechanism central: the noise is 0.4 clip norms at most"])
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 8}}))
    (tmp_path / "audit.json").write_text(json.dumps(broken))
    page = write_report(tmp_path).read_text()
    assert "a promise is broken" in page
    assert "the noise is 0.4 clip norms at most" in page
    assert "No promise was found broken" not in page


def test_the_terminal_has_a_line_for_each_setting() -> None:
    console = Console(width=160, record=True)
    console.print(leaks_table(make_audit()))
    text = console.export_text()
    assert "88% (7%)" in text
    assert "5.7, 5.7" in text
    assert "≤ 0.870, 0.800" in text
    assert "–, 5.7" in text


def test_what_was_not_audited_is_left_out() -> None:
    audit = make_audit(updates=[], membership=None, canaries=[], mechanisms=[])
    shown = leaks(audit)
    assert shown is not None
    assert shown["sentences"] == []
    assert tokens_figure(audit) is roc_figure(audit) is None
    Console(width=120, record=True).print(leaks_table(audit))
    assert leaks({}) is None


def test_central_noise_hides_nothing_from_the_server_that_adds_it() -> None:
    audit = make_audit(labels={"central": "this run", "none": "without noise"})
    shown = leaks(audit)
    assert shown is not None
    said = dict(shown["sentences"])
    assert list(said) == ["One update", "The noisy sum", "The final model"]
    assert said["One update"].startswith("The server, which is trusted to forget them, names 88%")
    assert "exposure" not in said["One update"]


def test_local_training_of_one_step_is_not_taken_for_plain_gradient_descent() -> None:
    plain, local = (
        make_update("none", "one update", 1, 0.88),
        {**make_update("none", "one update", 1, 0.31), "plain": False},
    )
    shown = leaks(make_audit(updates=[plain, local], membership=None))
    assert shown is not None
    (said,) = (text for who, text in shown["sentences"] if who == "One update")
    assert "88% of the 50" in said
    assert "31% of the 50" in said


def test_members_that_the_base_itself_tells_apart_mean_nothing() -> None:
    other = {**MEMBERSHIP, "base_auc": 0.71, "base_interval": [0.66, 0.75], "by_category": False}
    shown = leaks(make_audit(membership=other))
    assert shown is not None
    said = dict(shown["sentences"])["The final model"]
    assert "That means nothing: the base, which was trained on neither, tells them apart as well (AUC 0.710)" in said
    assert "no category in common" in said


def test_canaries_whose_client_was_not_drawn_have_no_exposure(tmp_path: Path) -> None:
    absent = {**make_canaries("none", None), "took_part": {"copied": 0, "tossed": 3}, "exposure": None,
              "update_exposure": None}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps({"config": {"rounds": 8}}))
    (tmp_path / "audit.json").write_text(json.dumps(make_audit(canaries=[absent, make_canaries("central", 8.0)])))
    page = write_report(tmp_path).read_text()
    assert "<td>0, 3</td><td>–</td><td>–</td>" in page
    assert "<td>5, 3</td>" in page


def test_every_setting_has_a_curve() -> None:
    names = ["none", "central", "dp-sgd", "local", "distributed"]
    labels = {name: f"as in {name}" for name in names}
    figure = roc_figure(make_audit(labels=labels, canaries=[make_canaries(name, None) for name in names]))
    assert all(f"as in {name}" in str(figure) for name in names[1:])
