"""Runs whose server sees sums alone, by the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedit import server

SECURE = ("secure_aggregation.clip_norm=50", "secure_aggregation.max_weight=40")
NOISY = (
    "privacy.mechanism=distributed",
    "privacy.target_epsilon=8",
    "privacy.clip_norm=0.1",
    "privacy.delta=0.01",
    "cohort.sampling=poisson",
    "cohort.fraction=0.9",
    "secure_aggregation.min_parties=2",
    "aggregation.name=fedit",
    "aggregation.weighting=uniform",
)


def run(fedit, recipe: Path, folder: Path, *options: str) -> list[dict]:
    overrides = [part for option in options for part in ("-o", option)]
    done = fedit("run", recipe, "--out", folder, *overrides)
    assert done.status == 0, done.output
    return [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_secure_sums_end_where_plain_updates_do(fedit, recipe, tmp_path) -> None:
    """But for the grid, where nothing is clipped; with a smaller clip norm the rounds move less."""
    plain = run(fedit, recipe, tmp_path / "plain")
    secure = run(fedit, recipe, tmp_path / "secure", *SECURE)
    clipped = run(fedit, recipe, tmp_path / "clipped", *SECURE, "secure_aggregation.clip_norm=0.01")
    for name, tensor in adapter(tmp_path / "plain").items():
        torch.testing.assert_close(adapter(tmp_path / "secure")[name], tensor, rtol=1e-3, atol=1e-4)
    told = "the server saw the sum of each round"
    assert told in (tmp_path / "secure" / "report.html").read_text()
    assert told not in (tmp_path / "plain" / "report.html").read_text()
    for one, other in zip(secure, plain, strict=True):
        assert (one["cohort"], one["failures"], one["tokens"]) == (other["cohort"], {}, other["tokens"])
        assert one["aggregation_loss"] is None
    assert clipped[0]["update_norm"] <= 0.01 * 1.001
    assert plain[0]["update_norm"] > 0.02


@pytest.mark.parametrize("options", [SECURE, NOISY], ids=["sums", "noise in shares"])
def test_resumed_it_ends_with_the_same_bits_and_the_same_epsilon(
    fedit, recipe, tmp_path, monkeypatch: pytest.MonkeyPatch, options: tuple[str, ...]
) -> None:
    """Masks are drawn anew, and sums are what they were."""
    whole = run(fedit, recipe, tmp_path / "whole", *options)
    apply, rounds = server.run_round, iter(range(9))

    def stop(*arguments, **named):
        if next(rounds) == 1:
            raise KeyboardInterrupt
        return apply(*arguments, **named)

    monkeypatch.setattr(server, "run_round", stop)
    overrides = [part for option in options for part in ("-o", option)]
    assert fedit("run", recipe, "--out", tmp_path / "run", *overrides).status == 130
    monkeypatch.setattr(server, "run_round", apply)
    assert fedit("run", "--resume", tmp_path / "run").status == 0
    assert [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()] == whole
    for name, tensor in adapter(tmp_path / "whole").items():
        assert torch.equal(adapter(tmp_path / "run")[name], tensor)


def test_a_run_with_noise_in_shares_says_what_it_promises(fedit, recipe, tmp_path) -> None:
    rounds = run(fedit, recipe, tmp_path / "run", *NOISY)
    promise = json.loads((tmp_path / "run" / "partition.json").read_text())["privacy"]
    assert promise["adjacency"] == "one client's update replaced by zero"
    assert promise["trust"].startswith("the server sees the noisy sums of rounds alone")
    assert rounds[-1]["epsilon"] == pytest.approx(promise["epsilon"])
    assert rounds[-1]["epsilon"] <= 8
    report = (tmp_path / "run" / "report.html").read_text()
    assert "the server sees the noisy sums of rounds alone" in report


def test_too_few_clients_for_a_sum_end_the_run(fedit, recipe, tmp_path) -> None:
    done = fedit(
        "run", recipe, "--out", tmp_path / "run", *[p for o in SECURE for p in ("-o", o)], "-o", "cohort.size=2"
    )
    assert done.status == 1
    assert "a secure sum of 2 parties, where [secure_aggregation] min_parties = 3" in " ".join(done.stderr.split())
