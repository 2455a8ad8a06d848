"""What an audit calls a broken promise."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from fedit.audit import canaries
from fedit.audit.bounds import EmpiricalEpsilon
from fedit.audit.canaries import CanaryAudit, row_epsilon
from fedit.audit.folder import undrawn, violations
from fedit.audit.mechanism import MechanismAudit
from fedit.audit.membership import Membership
from fedit.audit.subject import Setting, _with_names, noted, settings, with_privacy
from fedit.config import load_config
from fedit.data import EncodingReport
from fedit.interfaces import DataError, EncodedExample, Example, RoundError, Turn

FINE = MechanismAudit("central", 0.8, 0.9, 8.0, 7.0, 2.0, 7.8)
LABELS = {"dp-sgd": "rows, epsilon 2.5"}
HERE = Setting("central", "this run", load_config("default"))
CANARIES = CanaryAudit(
    "dp-sgd", 8, {"copied": 8, "tossed": 8}, 7.0, {}, None, 0.5, None, EmpiricalEpsilon(2.0, 1e-6, 128, 128, 120), 1.4,
    2.5,
    Membership(1, 0.5, (0, 1), 0, (0, 1), 0.5, 0.5, (0, 1)),
)  # fmt: skip


def test_what_holds_is_no_violation() -> None:
    nothing_found = dataclasses.replace(FINE, found_noise=None, found_epsilon=0.0)
    assert violations([(HERE, FINE), (HERE, nothing_found)], [CANARIES], LABELS) == []


def test_less_noise_than_promised_and_more_epsilon_than_accounted_for() -> None:
    less = dataclasses.replace(FINE, found_noise=0.41, found_epsilon=25.0)
    more = dataclasses.replace(FINE, one_run_epsilon=8.5)
    leaky = dataclasses.replace(CANARIES, sure_epsilon=3.5)
    first, second, third = violations([(HERE, less), (HERE, more)], [leaky], LABELS)
    assert "0.41 clip norms at most" in first
    assert "the true epsilon is 25.00 at least, the accountant says 8.00" in first
    assert "an epsilon of 8.50 is proven" in second
    assert third.startswith("rows, epsilon 2.5: canaries prove an epsilon of 3.50 of a row (with 99.9% confidence)")
    assert third.endswith("the accountant says 2.50")


def test_what_is_proven_with_95_percent_alone_is_no_violation() -> None:
    assert dataclasses.replace(CANARIES, empirical=EmpiricalEpsilon(2.6, 1e-6, 128, 128, 123)).holds


def test_what_promises_nothing_of_a_row_cannot_break_it() -> None:
    assert row_epsilon(load_config("default"), 8, [240]) is None
    assert dataclasses.replace(CANARIES, epsilon=None).holds


def test_a_rows_epsilon_grows_with_the_rounds_and_is_that_of_the_smallest_client() -> None:
    private = with_privacy(load_config("default"), {"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    few, more, smaller = (row_epsilon(private, *each) for each in ((4, [240]), (8, [240]), (8, [240, 60])))
    assert few is not None
    assert more is not None
    assert smaller is not None
    assert few < more < smaller


def test_what_a_recipe_cannot_have_is_named_with_the_reason() -> None:
    found, refused = settings(
        load_config("default", ["aggregation.name=multi-krum", "server_optimizer.learning_rate=1.0"]),
        {"a": 100, "b": 100},
    )
    assert [each.name for each in found] == ["none", "dp-sgd", "local"]
    assert "it needs each client's update" in refused["central, epsilon 8"]


def test_a_private_run_is_compared_with_itself_without_noise() -> None:
    private = with_privacy(load_config("default"), {"mechanism": "dp-sgd", "noise_multiplier": 1.0})
    found, _ = settings(private, {"a": 100, "b": 100})
    assert [(each.name, each.label) for each in found[:2]] == [("dp-sgd", "this run"), ("none", "without noise")]
    assert found[1].config.privacy is None


def test_what_cannot_be_audited_is_written_down_and_the_rest_goes_on() -> None:
    refused: dict[str, str] = {}
    with noted(refused, "canaries"):
        raise RoundError("too few came")
    assert refused == {"canaries": "too few came"}
    with pytest.raises(ZeroDivisionError), noted(refused, "a mistake"):
        _ = 1 / 0


def test_a_client_of_canaries_that_was_not_drawn_is_named() -> None:
    absent = dataclasses.replace(CANARIES, took_part={"copied": 0, "tossed": 2})
    setting = Setting("dp-sgd", "rows, epsilon 2.5", HERE.config)
    assert undrawn([absent], [setting]) == {
        "rows, epsilon 2.5, copied canaries": "Their client was not drawn in any of 8 rounds."
    }


def test_malicious_clients_stay_the_same_whoever_joins() -> None:
    run = load_config("default", ["attack.name=sign-flip", "attack.clients=0.25"])
    clients = [str(index) for index in range(8)]
    assert run.attack is not None
    expected = run.attack.malicious(clients, run.seed)
    for named in (
        _with_names(run, clients),
        with_privacy(_with_names(run, clients), {"mechanism": "dp-sgd", "noise_multiplier": 1.0}),
    ):
        assert named.attack is not None
        assert named.attack.malicious([*clients, "canaries"], run.seed) == expected


def test_canaries_of_texts_without_spaces_have_short_words_and_of_no_words_are_refused() -> None:
    rows = [make_row("一" * 40 + " so", "是")]
    assert canaries._words(rows) == ["一" * 12, "so", "是"]
    with pytest.raises(DataError, match="these have none"):
        canaries._words([make_row("?", "!")])


def make_row(asked: str, said: str) -> EncodedExample:
    return EncodedExample(np.arange(2, dtype=np.int32), np.array([False, True]), Example((Turn(asked, said),)))


def test_a_canary_that_does_not_encode_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    report = EncodingReport(1, 1, 1, 0, 1, 0, 0, ())
    monkeypatch.setattr(canaries, "encode_all", lambda *_: ([make_row("a", "b")], report))
    subject = cast(Any, SimpleNamespace(config=HERE.config, model=SimpleNamespace(tokenizer=None)))
    with pytest.raises(DataError, match="of 2 canaries, random words of held-out rows, 1 are too long"):
        canaries._encoded(subject, [Example(()), Example(())])
