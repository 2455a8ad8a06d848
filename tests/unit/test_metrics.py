"""`evaluation.json` against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fedit.evaluation.metrics import Prediction, rouge_l, summarise
from fedit.interfaces import DataError

CATEGORIES = ("a", "a", "b")
NUM_TOKENS = (2, 2, 4)


def predictions(model, losses, passed=None, categories=CATEGORIES, num_tokens=NUM_TOKENS):
    """One prediction per row: `losses` are sums over the row's tokens, `passed` None: nothing was generated."""
    return [
        Prediction(
            model=model,
            index=index,
            category=categories[index],
            instruction="Ask.",
            context="",
            reference="Answer.",
            answer=None if passed is None else "Answer.",
            passed=None if passed is None else bool(passed[index]),
            rouge_l=None if passed is None else passed[index] / 2,
            nll=loss,
            num_tokens=num_tokens[index],
        )
        for index, loss in enumerate(losses)
    ]


def four_models():
    return {
        "base": predictions("base", [8, 8, 16], [0, 0, 0]),
        "local/x": predictions("local/x", [2, 4, 18], [1, 1, 0]),
        "local/y": predictions("local/y", [6, 8, 10], [0, 0, 0]),
        "central": predictions("central", [2, 2, 4], [1, 1, 1]),
        "federated": predictions("federated", [2, 3, 5], [1, 1, 0]),
    }


TOKENS = {"base": 0, "local/x": 100, "local/y": 201, "central": 300, "federated": 300}


def test_losses_are_per_token_and_matches_per_row():
    models = summarise(four_models(), TOKENS, seed=0)["models"]
    assert list(models) == ["base", "local", "central", "federated"]
    assert models["federated"]["response_loss"] == {"all": 10 / 8, "a": 5 / 4, "b": 5 / 4}
    assert models["federated"]["exact_match"] == {"all": 2 / 3, "a": 1, "b": 0}
    assert models["federated"]["rouge_l"] == {"all": 1 / 3, "a": 0.5, "b": 0}
    assert models["federated"]["tokens"] == 300


def test_local_is_the_mean_over_clients():
    local = summarise(four_models(), TOKENS, seed=0)["models"]["local"]
    assert local["response_loss"] == {
        "all": (24 / 8 + 24 / 8) / 2,
        "a": (6 / 4 + 14 / 4) / 2,
        "b": (18 / 4 + 10 / 4) / 2,
    }
    assert local["exact_match"] == {"all": pytest.approx(1 / 3), "a": 0.5, "b": 0}
    assert local["tokens"] == 150
    assert list(local["per_client"]) == ["x", "y"]
    assert local["per_client"]["x"]["response_loss"]["a"] == 6 / 4
    assert local["per_client"]["y"]["tokens"] == 201


def test_gap_closed_and_differences():
    result = summarise(four_models(), TOKENS, seed=0)
    assert result["gap_closed"] == (3 - 10 / 8) / (3 - 1)
    assert result["gap_closed_reason"] is None
    low, high = result["gap_closed_confidence"]
    assert low <= result["gap_closed"] <= high
    assert result["differences"]["federated_minus_local"]["response_loss"]["all"] == 10 / 8 - 3
    assert result["differences"]["federated_minus_central"]["exact_match"]["all"] == pytest.approx(-1 / 3)
    assert result["num_test_rows"] == {"all": 3, "a": 2, "b": 1}


def test_a_paired_interval_is_narrower_than_its_parts():
    hard = np.tile([1.0, 9.0], 50)
    rows = {"categories": ["a"] * 100, "num_tokens": [1] * 100}
    models = {
        "local/x": predictions("local/x", hard + 1, **rows),
        "federated": predictions("federated", hard, **rows),
    }
    result = summarise(models, {"local/x": 1, "federated": 1}, seed=0)
    own = result["models"]["federated"]["confidence"]["response_loss"]["all"]
    paired = result["differences"]["federated_minus_local"]["confidence"]["response_loss"]["all"]
    assert own[1] - own[0] > 1
    assert paired == pytest.approx([-1, -1])


@pytest.mark.parametrize(
    ("without", "reason"),
    [
        ("central", "not evaluated: central"),
        ("local", "not evaluated: local"),
        ("federated", "not evaluated: federated"),
    ],
)
def test_gap_needs_three_models(without, reason):
    models = {name: rows for name, rows in four_models().items() if not name.startswith(without)}
    result = summarise(models, TOKENS, seed=0)
    assert (result["gap_closed"], result["gap_closed_confidence"]) == (None, None)
    assert result["gap_closed_reason"] == reason


def test_no_gap_where_centralised_is_no_better():
    models = four_models() | {"central": predictions("central", [8, 8, 8], [1, 1, 1])}
    result = summarise(models, TOKENS, seed=0)
    assert result["gap_closed"] is None
    assert result["gap_closed_reason"] == "centralised training is no better than local-only training"


def test_gap_without_an_interval_where_resamples_have_no_gap():
    models = four_models() | {"central": predictions("central", [8, 8, 4], [1, 1, 1])}
    result = summarise(models, TOKENS, seed=0)
    assert result["gap_closed"] == pytest.approx((3 - 10 / 8) / (3 - 20 / 8))
    assert result["gap_closed_confidence"] is None


def test_without_generation_two_metrics_are_absent():
    models = four_models() | {"base": predictions("base", [8, 8, 16])}
    result = summarise(models, TOKENS, seed=0)
    assert set(result["models"]["base"]) == {"response_loss", "confidence", "tokens"}
    assert set(result["models"]["base"]["confidence"]) == {"response_loss"}
    assert "exact_match" in result["models"]["federated"]


def test_local_has_only_what_all_clients_have():
    models = four_models() | {"local/y": predictions("local/y", [6, 8, 10])}
    result = summarise(models, TOKENS, seed=0)
    assert "exact_match" not in result["models"]["local"]
    assert "exact_match" in result["models"]["local"]["per_client"]["x"]
    assert set(result["differences"]["federated_minus_local"]) == {"response_loss", "confidence"}


def test_a_single_row_has_no_interval():
    confidence = summarise(four_models(), TOKENS, seed=0)["models"]["base"]["confidence"]["response_loss"]
    assert set(confidence) == {"all", "a"}


def test_worst_client_and_worst_tenth():
    models = {
        f"local/{client}": predictions(f"local/{client}", [client, client, client], [0, 0, client % 2])
        for client in range(1, 12)
    }
    result = summarise(models, dict.fromkeys(models, 1), seed=0)
    assert result["worst_client"] == {"client": "11", "response_loss": 33 / 8, "exact_match": 1 / 3, "rouge_l": 1 / 6}
    assert result["worst_tenth"]["clients"] == ["11", "10"]
    assert result["worst_tenth"]["response_loss"] == (33 / 8 + 30 / 8) / 2
    assert result["worst_tenth"]["exact_match"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_diverged_model_is_none_and_the_worst(loss):
    models = four_models() | {"local/y": predictions("local/y", [6, loss, 10], [0, 0, 0])}
    result = summarise(models, TOKENS, seed=0)
    diverged = result["models"]["local"]["per_client"]["y"]
    assert diverged["response_loss"] == {"all": None, "a": None, "b": 10 / 4}
    assert diverged["confidence"]["response_loss"] == {}
    assert result["models"]["local"]["response_loss"]["all"] is None
    assert result["worst_client"]["client"] == "y"
    assert result["worst_client"]["response_loss"] is None
    assert result["gap_closed_reason"] == "a loss is not finite: the model diverged"


def test_interval_agrees_with_the_normal_approximation():
    rng = np.random.default_rng(0)
    num_tokens = rng.integers(1, 20, 400)
    losses = num_tokens * rng.gamma(4, 0.5, 400)
    rows = predictions("base", losses, [0] * 400, categories=["a"] * 400, num_tokens=num_tokens)
    low, high = summarise({"base": rows}, {"base": 0}, seed=0)["models"]["base"]["confidence"]["response_loss"]["all"]
    ratio = losses.sum() / num_tokens.sum()
    deviation = np.std(losses - ratio * num_tokens, ddof=1) * math.sqrt(400) / num_tokens.sum()
    assert [low, high] == pytest.approx([ratio - 1.96 * deviation, ratio + 1.96 * deviation], rel=0.02)


def test_interval_covers_the_truth_about_19_times_in_20():
    rng = np.random.default_rng(1)
    num_covered = 0
    for seed in range(60):
        passed = rng.random(100) < 0.3
        rows = predictions("base", [1.0] * 100, passed, categories=["a"] * 100, num_tokens=[1] * 100)
        low, high = summarise({"base": rows}, {"base": 0}, seed)["models"]["base"]["confidence"]["exact_match"]["all"]
        num_covered += low <= 0.3 <= high
    assert 53 <= num_covered <= 60


def test_same_seed_same_result():
    assert summarise(four_models(), TOKENS, seed=3) == summarise(four_models(), TOKENS, seed=3)
    losses = np.random.default_rng(0).random(50)
    models = {"base": predictions("base", losses, categories=["a"] * 50, num_tokens=[1] * 50)}
    one, other = (summarise(models, {"base": 0}, seed)["models"]["base"]["confidence"] for seed in (3, 4))
    assert one != other


def test_models_must_answer_the_same_rows():
    with pytest.raises(DataError, match=r"'central' and model 'base' did not answer the same 3 test rows.*\(2 rows"):
        summarise(four_models() | {"central": predictions("central", [1, 1])}, TOKENS, seed=0)
    with pytest.raises(DataError, match="No predictions"):
        summarise({}, {}, seed=0)
    with pytest.raises(DataError, match="'all'"):
        summarise({"base": predictions("base", [1, 1, 1], categories=("all", "b", "c"))}, {"base": 0}, seed=0)


def test_rouge_l():
    assert rouge_l("the cats sat", "the cats sat") == 1
    assert rouge_l("cat", "cats") == 1  # stemmed
    assert rouge_l("", "the cat") == 0
    # the longest common subsequence is "police the": precision 2/4, recall 2/4
    assert rouge_l("police kill the gunman", "police ended the siege") == 0.5
    # "a b" of 2 and of 3 words: precision 1, recall 2/3
    assert rouge_l("red fox", "red brown fox") == pytest.approx(0.8)
