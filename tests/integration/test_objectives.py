"""Local objectives, from the command line to what the clients and the server keep."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

SGD = ("client.optimizer=sgd", "client.clip_norm=none", "client.learning_rate=0.5")


def run(fedit, recipe: Path, out: Path, *options: str) -> list[dict[str, Any]]:
    chosen = [part for option in ("evaluation.baselines=false", *options) for part in ("-o", option)]
    done = fedit("run", recipe, "--out", out, *chosen)
    assert done.status == 0, done.stderr
    return [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]


def named(file: Path, prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in load_file(file).items() if name.startswith(prefix)}


def test_fedprox_holds_clients_near(fedit, recipe, tmp_path) -> None:
    plain = run(fedit, recipe, tmp_path / "plain")
    none = run(fedit, recipe, tmp_path / "none", "objective.name=fedprox", "objective.mu=0")
    near = run(fedit, recipe, tmp_path / "near", "objective.name=fedprox", "objective.mu=1000")
    assert none == plain
    assert near[0]["update_norm"] < plain[0]["update_norm"]


def test_scaffold_keeps_the_control_variates_of_the_paper(fedit, recipe, tmp_path) -> None:
    """From round to round: c_k <- c_k - c + (x_received - x_k) / (K eta), c <- c + sum of the changes / N.

    With uniform weights the mean of the x_k is the next adapter, so that its step tells the mean of the c_k.
    """
    uniform = ("aggregation.name=fedit", "aggregation.weighting=uniform", "rounds=3", *SGD)
    plain = run(fedit, recipe, tmp_path / "plain", *uniform)
    out = tmp_path / "run"
    rounds = run(fedit, recipe, out, "objective.name=scaffold", *uniform)
    checkpoints = [out / "checkpoints" / f"round-0000{index}.safetensors" for index in (2, 3)]
    before, after = (named(file, "adapter/") for file in checkpoints)
    c_before, c_after = (named(file, "control/") for file in checkpoints)
    clients = ["0", "1", "2"]
    kept = {k: [named(out / "clients" / k / f"round-0000{i}.safetensors", "control/") for i in (1, 2)] for k in clients}
    for name in after:
        mean_step = (before[name] - after[name]) / (2 * 0.5)  # two steps of rate 0.5
        mean_before, mean_after = (torch.stack([kept[k][i][name] for k in clients]).mean(dim=0) for i in (0, 1))
        torch.testing.assert_close(mean_after, mean_before - c_before[name] + mean_step, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(c_after[name], c_before[name] + mean_after - mean_before, rtol=1e-4, atol=1e-6)
    assert rounds[0]["update_norm"] == plain[0]["update_norm"], "all are zero in the first round"
    assert rounds[-1]["update_norm"] != plain[-1]["update_norm"]
    assert rounds[0]["bytes_up"] == 2 * plain[0]["bytes_up"]
    assert (rounds[0]["bytes_down"], rounds[1]["bytes_down"]) == (plain[0]["bytes_down"], 2 * plain[1]["bytes_down"])


def test_the_control_variate_is_downloaded_whole_beside_a_compressed_step(fedit, recipe, tmp_path) -> None:
    options = ("rounds=2", "download.quantizer=int8", *SGD)
    plain = run(fedit, recipe, tmp_path / "plain", *options)
    control = run(fedit, recipe, tmp_path / "run", "objective.name=scaffold", *options)
    whole = run(fedit, recipe, tmp_path / "whole", "rounds=1", *SGD)[0]["bytes_down"]
    assert control[1]["bytes_down"] == plain[1]["bytes_down"] + whole


def test_fedprox_draws_a_client_to_its_own_factor(fedit, recipe, tmp_path) -> None:
    """Under FedSA-LoRA B is the client's: a strong pull holds it where its round began, not at zero."""
    options = ("aggregation.name=fedsa-lora", "rounds=3", "client.learning_rate=0.05")
    run(fedit, recipe, tmp_path / "run", *options, "objective.name=fedprox", "objective.mu=1e-9")
    run(fedit, recipe, tmp_path / "held", *options, "objective.name=fedprox", "objective.mu=0.5")

    def own(folder: str, index: int) -> Tensor:
        kept = named(tmp_path / folder / "clients" / "1" / f"round-0000{index}.safetensors", "private/")
        return torch.cat([tensor.flatten() for tensor in kept.values()])

    assert own("held", 2).norm() > 1.2 * own("held", 0).norm(), "it goes on from round to round"


def test_ditto_has_a_model_for_all_and_one_for_each(fedit, recipe, tmp_path) -> None:
    plain = run(fedit, recipe, tmp_path / "plain")
    out = tmp_path / "run"
    rounds = run(fedit, recipe, out, "objective.name=ditto", "objective.strength=0.01")
    assert rounds == plain, "the federation is the plain one"
    evaluation = json.loads((out / "evaluation.json").read_text())
    own = evaluation["models"]["personal"]["per_client"]
    assert len({model["response_loss"]["all"] for model in own.values()} | {rounds[-1]["test_loss"]}) == 4
    assert evaluation["personal_worst_client"]["client"] in own
    assert sorted(path.name for path in (out / "adapters").iterdir()) == sorted(own)
    assert (out / "adapter" / "adapter_model.safetensors").is_file()
    assert "Clients&#39; own" in (out / "report.html").read_text()
    assert fedit("export", out, "--merged", tmp_path / "all").status == 0
    assert fedit("export", out, "--merged", tmp_path / "one", "--model", "personal/1").status == 0


PRUNING = ("objective.name=self-pruning", "objective.strength=10", "aggregation.name=hetlora", "adapter.rank=[4, 2]")


@pytest.mark.parametrize("rule", ["hetlora", "flexlora", "raflora", "flora", "fedit-plus"])
def test_clients_prune_their_ranks(fedit, recipe, tmp_path, rule: str) -> None:
    """Once, in a round: then they send, and are sent, the ranks that they kept; nobody in the first, where B is 0."""
    whole = run(
        fedit, recipe, tmp_path / "whole", *PRUNING, f"aggregation.name={rule}", "objective.strength=0", "rounds=4"
    )
    rounds = run(fedit, recipe, tmp_path / "run", *PRUNING, f"aggregation.name={rule}", "rounds=4")
    assert rounds[0]["ranks"] == {}
    ranks = {"0": 4, "1": 2, "2": 4}
    for before, line in itertools.pairwise(rounds):
        for client, rank in line["ranks"].items():
            assert rank == ranks[client] * 3 // 4
            ranks[client] = rank
        assert line["bytes_up"] <= before["bytes_up"]
    if rule == "flora":  # B is 0 at the start of each round
        assert ranks == {"0": 4, "1": 2, "2": 4}
        return
    assert ranks["1"] == 1
    assert rounds[-1]["bytes_up"] < whole[-1]["bytes_up"]
    assert rounds[-1]["bytes_down"] <= whole[-1]["bytes_down"]


@pytest.mark.parametrize("objective", ["ditto", "scaffold", "self-pruning"])
def test_what_clients_keep_is_there_after_a_resume(fedit, recipe, tmp_path, monkeypatch, objective: str) -> None:
    """Stopped after the first round by a full disk, in the second round of three."""
    more = {"scaffold": SGD, "self-pruning": PRUNING}
    options = (f"objective.name={objective}", "rounds=3", *more.get(objective, ()))
    expected = run(fedit, recipe, tmp_path / "whole", *options)
    from fedit import experiment

    save, saved = experiment.save_state, []

    def fail_at_two(state: Any, folder: Path) -> None:
        saved.append(state.round_index)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(state, folder)

    monkeypatch.setattr(experiment, "save_state", fail_at_two)
    chosen = [part for option in ("evaluation.baselines=false", *options) for part in ("-o", option)]
    assert fedit("run", recipe, "--out", tmp_path / "run", *chosen).status == 130
    assert fedit("run", "--resume", tmp_path / "run").status == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "rounds.jsonl").read_text().splitlines()]
    assert lines == expected


def test_dpo_learns_what_is_preferred(fedit, recipe, tmp_path) -> None:
    """Held-out: the model prefers what was chosen to what was rejected, more than the base does."""
    rows = [
        {"prompt": f"{letter}{number}?", "chosen": letter * 3, "rejected": "z" * (2 + number % 3)}
        for letter in "abc"
        for number in range(10)
    ]
    data = tmp_path / "preferences.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = (
        f"data.path={data}",
        "data.test_per_category=6",
        "rounds=4",
        "client.local_steps=8",
        "client.learning_rate=0.02",
    )
    rounds = run(fedit, recipe, tmp_path / "run", "objective.name=dpo", *options, "evaluation.baselines=true")
    assert rounds[-1]["train_loss"] + 0.05 < rounds[0]["train_loss"] < 0.7, "0.69 where it prefers nothing"
    accuracy = json.loads((tmp_path / "run" / "evaluation.json").read_text())["preference_accuracy"]
    assert accuracy["base"] == 0.5
    assert {accuracy[name] for name in ("federated", "central", "local/0")} == {1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("objective.name=scaffold",), "AdamW's steps are not its gradients"),
        (("objective.name=scaffold", "client.optimizer=sgd"), 'clip_norm = "none"'),
        (("objective.name=scaffold", *SGD, "aggregation.name=flexlora"), "changes the factors' basis"),
        (("objective.name=scaffold", *SGD, "aggregation.name=rolora"), "which of them are trained"),
        (("objective.name=ditto", "aggregation.name=fedsa-lora"), "does not train and share both"),
        (("objective.name=ditto", "aggregation.name=flora"), "changes the factors' basis"),
        (("objective.name=dpo",), "no rejected response"),
        (("objective.name=ditto", "aggregation.name=hetlora", "adapter.rank=[2, 1]"), "clients of equal rank"),
        (("objective.name=self-pruning",), "needs equal ones. Use one of: hetlora, flora"),
        ((*PRUNING, "client.moments=keep"), 'Use [client] moments = "reset"'),
        ((*PRUNING, "upload.quantizer=int8"), "leave [upload] out"),
        ((*PRUNING, "objective.keep=1"), "less than 1"),
        (("objective.name=fedprxo",), "Did you mean 'fedprox'?"),
        (("client.optimizer=sgd", "client.moments=keep"), "sgd has none"),
    ],
)
def test_objectives_that_cannot_work(fedit, recipe, tmp_path, options: tuple[str, ...], message: str) -> None:
    chosen = [part for option in options for part in ("-o", option)]
    done = fedit("run", recipe, "--out", tmp_path / "run", *chosen)
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()
