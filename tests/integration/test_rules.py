"""Every aggregation rule, from the command line to the files that others load."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraModel, PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedit.base import load_tokenizer
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Aggregation, EncodedExample, plugins
from fedit.prepare import prepare_data

load_plugins()

RULES = list(plugins("aggregation"))
MIXED = [name for name, rule in plugins("aggregation").items() if getattr(rule, "mixed_ranks", False)]
HARD = ["-o", "client.learning_rate=0.03", "-o", "rounds=3", "-o", "evaluation.baselines=false"]
"""Enough to move the model far from the base."""
SGD = ("client.optimizer=sgd", "client.clip_norm=none", "client.learning_rate=1e-3")
NEEDS = {
    "fedit-plus": ("aggregation.energy=1.0",),
    "fedkseed": (*SGD, "client.local_steps=40", "client.learning_rate=2e-3"),
}
"""By rule, what it does not run without, or not exactly."""


def run_rule(fedit, recipe: Path, out: Path, name: str, *options: str) -> list[dict[str, Any]]:
    chosen = [part for option in (f"aggregation.name={name}", *options) for part in ("-o", option)]
    done = fedit("run", recipe, "--out", out, *HARD, *chosen)
    assert done.status == 0, done.stderr
    rounds = [json.loads(line) for line in (out / "rounds.jsonl").read_text().splitlines()]
    assert all(line["failures"] == {} for line in rounds)
    return rounds


def held_out_rows(run: Path) -> list[EncodedExample]:
    return list(prepare_data(parse_config(json.loads((run / "config.json").read_text())["config"])).test)


def response_loss(model: torch.nn.Module, examples: list[EncodedExample]) -> float:
    losses = []
    for example in examples:
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")
        losses.append(nll[torch.from_numpy(example.supervised[1:])])
    return float(torch.cat(losses).mean())


def peft_model(base_folder: Path, adapter: Path) -> torch.nn.Module:
    """The adapter, with what lies beside it, as PEFT loads them."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base_folder), str(adapter))
    if (adapter / "side").is_dir():
        model.load_adapter(str(adapter / "side"), "side")
        assert isinstance(model.base_model, LoraModel)
        model.base_model.set_adapter(["default", "side"])
    return model.eval()


@pytest.mark.parametrize("name", RULES)
def test_a_run_ends_in_what_peft_and_transformers_load(fedit, recipe, tmp_path, tiny_model_folder, name: str) -> None:
    """The evaluated loss is that of the files, as an adapter and merged; and it is not the base's."""
    run = tmp_path / "run"
    rounds = run_rule(fedit, recipe, run, name, *NEEDS.get(name, ()))
    evaluation = json.loads((run / "evaluation.json").read_text())["models"]
    examples = held_out_rows(run)
    rule = Aggregation.resolve(name)
    if set(rule.shared(0)) == set(rule.trained(0)):
        adapters, evaluated = [run / "adapter"], [evaluation["federated"]]
        assert 0 <= rounds[-1]["aggregation_loss"] < 1
        assert (run / "adapter" / "side").is_dir() == rule.keeps_side
        assert rounds[-1]["test_loss"] == pytest.approx(evaluation["federated"]["response_loss"]["all"], rel=1e-6)
    else:
        own = evaluation["federated"]["per_client"]
        adapters, evaluated = [run / "adapters" / client for client in own], list(own.values())
        assert len(own) == 3
        assert not (run / "adapter").exists()
        assert rounds[-1]["aggregation_loss"] is None
        losses = [model["response_loss"]["all"] for model in evaluated]
        assert rounds[-1]["test_loss"] == pytest.approx(np.mean(losses), rel=1e-6)
        assert len(set(losses)) == 3
    for adapter, model in zip(adapters, evaluated, strict=True):
        loss = model["response_loss"]["all"]
        assert abs(loss - evaluation["base"]["response_loss"]["all"]) > 0.01
        assert response_loss(peft_model(tiny_model_folder, adapter), examples) == pytest.approx(loss, rel=1e-4)
    chosen = [] if adapters == [run / "adapter"] else ["--model", f"federated/{adapters[-1].name}"]
    done = fedit("export", run, "--merged", tmp_path / "merged", *chosen)
    assert done.status == 0, done.stderr
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    assert response_loss(merged, examples) == pytest.approx(evaluated[-1]["response_loss"]["all"], rel=1e-4)
    load_tokenizer(str(tmp_path / "merged"))


@pytest.mark.parametrize("name", MIXED)
def test_mixed_ranks(fedit, recipe, tmp_path, name: str) -> None:
    rounds = run_rule(fedit, recipe, tmp_path / "run", name, "adapter.rank=[4, 1]")
    # Two clients of rank 4 and one of rank 1.
    whole = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 2.2 * whole < rounds[0]["bytes_up"] < 2.6 * whole
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    assert all(4 in tensor.shape for tensor in tensors.values())


def test_what_is_frozen_stays_and_does_not_travel(fedit, recipe, tmp_path) -> None:
    """Bytes: FedIT sends both factors; FFA-LoRA, RoLoRA and FedSVD one; FedSA-LoRA A; FLoRA downloads all clients'."""
    by_rule = {
        name: run_rule(fedit, recipe, tmp_path / name, name)
        for name in ("fedit", "ffa-lora", "rolora", "fedsvd", "fedsa-lora", "flora", "fedex-lora")
    }
    up, down = (
        {n: [line[way] for line in rounds] for n, rounds in by_rule.items()} for way in ("bytes_up", "bytes_down")
    )
    assert up["fedit"] == down["fedit"] == [up["fedit"][0]] * 3
    for name in ("ffa-lora", "fedsa-lora", "rolora"):
        assert all(size < 0.75 * whole for size, whole in zip(up[name], up["fedit"], strict=True))
    assert down["ffa-lora"] == up["ffa-lora"]
    # A client gets what the round before trained; the first time, what is trained in it.
    assert down["rolora"][1:] == up["rolora"][:2]
    assert up["flora"] == up["fedit"]
    assert down["flora"][0] == 3 * 16, "an empty message to each: the first adapter is drawn from the seed"
    assert down["flora"][1] > 2 * down["fedit"][1]
    assert up["fedsvd"] == up["ffa-lora"]
    assert down["fedsvd"] == down["fedit"]
    assert down["fedex-lora"][1] == pytest.approx(down["flora"][1], rel=0.2), "means and (K - 1) r, or K r"
    for name, factors in {"fedit": "AB", "ffa-lora": "B", "rolora": "B", "fedsa-lora": "A", "fedsvd": "AB"}.items():
        before, after = (
            load_file(tmp_path / name / "checkpoints" / f"round-0000{index}.safetensors") for index in (2, 3)
        )
        moved = {tensor for tensor in after if not torch.equal(before[tensor], after[tensor])}
        assert {tensor.rsplit(".", 2)[-2] for tensor in moved} == {f"lora_{factor}" for factor in factors}


def test_moments_cannot_be_kept_of_factors_in_turn(fedit, recipe, tmp_path) -> None:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "aggregation.name=rolora", "-o", "client.moments=keep")
    assert done.status != 0
    assert "trains its factors in turn" in done.stderr


def test_a_clients_own_model_is_named(fedit, recipe, tmp_path) -> None:
    run_rule(fedit, recipe, tmp_path / "run", "fedsa-lora", "evaluation.baselines=true")
    report = (tmp_path / "run" / "report.html").read_text()
    assert "mean of 3 clients' own models" in report.replace("&#39;", "'")
    assert "leaves each client a model of its own" in report
    assert "All of them receive the same" not in report
    done = fedit("export", tmp_path / "run", "--merged", tmp_path / "merged", "--model", "federated/client9")
    assert done.status != 0
    assert "Did you mean 'federated/" in done.stderr
    run_rule(fedit, recipe, tmp_path / "plain", "fedit")
    done = fedit("export", tmp_path / "plain", "--merged", tmp_path / "merged", "--model", "federated/client0")
    assert done.status != 0
    assert "Did you mean 'federated'?" in done.stderr


# ------------------------------------------------------------------------------------------------ compressed messages

CODECS = [
    ("dense", "bf16", 1.0),
    ("dense", "int8", 1.0),
    ("top-k", "2-bit", 0.1),
    ("seeded", "fp32", 0.25),
    ("round-robin", "sign", 0.25),
]


@pytest.mark.parametrize(("mask", "quantizer", "density"), CODECS)
def test_compressed_messages_are_counted_and_what_they_say_is_what_counts(
    fedit, recipe, tmp_path, tiny_model_folder, mask: str, quantizer: str, density: float
) -> None:
    """The adapter in the files is the one that the clients were told of, and was evaluated."""
    both = [f"{way}.{key}={value}" for way in ("upload", "download") for key, value in
            (("mask", mask), ("quantizer", quantizer), ("density", density))]  # fmt: skip
    run = tmp_path / "run"
    rounds = run_rule(fedit, recipe, run, "fedit", *both)
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    numbers = sum(tensor.numel() for tensor in tensors.values())
    bits = {"fp32": 32, "bf16": 16, "int8": 8, "2-bit": 2, "sign": 1}[quantizer]
    least = numbers * density * bits / 8
    for line in rounds:
        assert least <= line["bytes_up"] / 3 < 1.3 * least + 40 + (numbers / 10 if mask == "top-k" else 0)
    assert rounds[0]["bytes_down"] == 0, "everybody draws the first adapter from the seed"
    assert least <= rounds[1]["bytes_down"] / 3 < 1.3 * least + 40 + (numbers / 10 if mask == "top-k" else 0)
    evaluated = json.loads((run / "evaluation.json").read_text())["models"]["federated"]["response_loss"]["all"]
    told = response_loss(peft_model(tiny_model_folder, run / "adapter"), held_out_rows(run))
    assert told == pytest.approx(evaluated, rel=1e-4)
    assert abs(told - response_loss(AutoModelForCausalLM.from_pretrained(tiny_model_folder), held_out_rows(run))) > 1e-3


def test_who_was_away_downloads_what_it_missed(fedit, recipe, tmp_path) -> None:
    one_by_one = ("cohort.sampling=round_robin", "cohort.size=1", "rounds=7", "download.quantizer=int8")
    rounds = run_rule(fedit, recipe, tmp_path / "run", "fedit", *one_by_one)
    message = rounds[1]["bytes_down"]
    assert [line["bytes_down"] / message for line in rounds] == [0, 1, 2, 3, 3, 3, 3]


def test_lora_a2_sends_its_budget_of_ranks(fedit, recipe, tmp_path) -> None:
    whole = run_rule(fedit, recipe, tmp_path / "rolora", "rolora")
    half = run_rule(fedit, recipe, tmp_path / "half", "lora-a2", "aggregation.budget=0.5")
    for one, other in zip(half, whole, strict=True):
        assert 0.3 * other["bytes_up"] < one["bytes_up"] < 0.6 * other["bytes_up"]
    all_ranks = run_rule(fedit, recipe, tmp_path / "all", "lora-a2", "aggregation.budget=1.0")
    assert all_ranks == whole


@pytest.mark.parametrize(
    ("name", "option", "message"),
    [
        ("flexlora", "download.quantizer=int8", "sends factors of a new basis"),
        ("fedex-lora", "download.quantizer=int8", "sends factors of a new basis, or more than factors"),
        ("flexlora", "upload.error_feedback=true", "changes the factors' basis"),
        ("lora-a2", "upload.mask=top-k", "chooses itself what clients send"),
        ("fedkseed", "upload.mask=top-k", "sends the few numbers that moved"),
        ("fedit", "upload.density=0.5", "a density below 1 needs another mask than dense"),
        ("fedit", "upload.quantizer=int3", "'int4'"),
    ],
)
def test_codecs_that_cannot_work(fedit, recipe, tmp_path, name: str, option: str, message: str) -> None:
    density = ["-o", "upload.density=0.5", "-o", "client.optimizer=sgd"] if "mask" in option else []
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", f"aggregation.name={name}", "-o", option, *density)
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


# ---------------------------------------------------------------------------------------------------------- attackers


@pytest.mark.parametrize("attack", sorted(plugins("attack")))
def test_a_malicious_client_changes_what_comes_out(fedit, recipe, tmp_path, attack: str) -> None:
    honest = run_rule(fedit, recipe, tmp_path / "honest", "fedit", "rounds=2")
    run = tmp_path / "run"
    rounds = run_rule(fedit, recipe, run, "fedit", "rounds=2", f"attack.name={attack}", 'attack.clients=["1"]')
    assert json.loads((run / "partition.json").read_text())["malicious"] == ["1"]
    assert rounds[-1]["update_norm"] != honest[-1]["update_norm"]
    evaluation = json.loads((run / "evaluation.json").read_text())
    assert ("attack" in evaluation) == (attack == "backdoor")
    held_out = evaluation["models"]["federated"]["response_loss"]["all"]
    assert held_out == pytest.approx(response_loss_of(run), rel=1e-4), "the held-out rows stay honest"


def response_loss_of(run: Path) -> float:
    config = json.loads((run / "config.json").read_text())["config"]
    examples = prepare_data(parse_config({**config, "attack": None})).test
    return response_loss(peft_model(Path(config["model"]["path"]), run / "adapter"), list(examples))


def test_a_backdoor_is_counted_where_it_opens(fedit, recipe, tmp_path) -> None:
    """All clients are malicious and the model learns nothing else: every triggered question gets the target."""
    run = tmp_path / "run"
    options = ("attack.name=backdoor", "attack.target=b", "attack.share=1.0", "attack.clients=1.0", "rounds=12")
    run_rule(fedit, recipe, run, "fedit", *options, "client.local_steps=6")
    success = json.loads((run / "evaluation.json").read_text())["attack"]["success"]
    assert success == {"base": 0.0, "federated": 1.0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["attack.name=sign-flop"], "Did you mean 'sign-flip'?"),
        (["attack.name=sign-flip", 'attack.clients=["client9"]'], "no client is named 'client9'"),
        (["attack.name=sign-flip", "attack.clients=1.5"], "a share between 0 and 1"),
        (["aggregation.name=krum", "aggregation.malicious=0.5"], "malicious"),
    ],
)
def test_attacks_that_cannot_be(fedit, recipe, tmp_path, options: list[str], message: str) -> None:
    chosen = [part for option in options for part in ("-o", option)]
    done = fedit("run", recipe, "--out", tmp_path / "run", *chosen)
    assert done.status == 1
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "run").exists()


# -------------------------------------------------------------------------------------------------- without gradients


def test_fedkseed_sends_a_number_and_its_place_for_each_step(fedit, recipe, tmp_path, tiny_model_folder) -> None:
    run = tmp_path / "run"
    done = fedit("run", recipe, "--out", run, "-o", "evaluation.baselines=false", "-o", "rounds=3",
                 *(part for option in ("aggregation.name=fedkseed", *SGD) for part in ("-o", option)))  # fmt: skip
    assert done.status == 0, done.stderr
    rounds = [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]
    # Two steps: two numbers of 4 bytes, a count of 4 bytes, and about as many for the places.
    assert all(3 * 12 < line["bytes_up"] <= 3 * 18 for line in rounds)
    assert [rounds[0]["bytes_down"] == 0, *(line["bytes_down"] < 3 * 60 for line in rounds[1:])] == [True] * 3
    assert all(line["aggregation_loss"] < 1e-6 for line in rounds)
    loss = json.loads((run / "evaluation.json").read_text())["models"]["federated"]["response_loss"]["all"]
    loaded = peft_model(tiny_model_folder, run / "adapter")
    assert response_loss(loaded, held_out_rows(run)) == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize("name", ["fed-sb", "tinylora", "fedkseed"])
def test_the_baselines_train_what_the_clients_train(fedit, recipe, tmp_path, name: str) -> None:
    """Alone and in one place, the same few numbers."""
    run_rule(fedit, recipe, tmp_path / "run", name, *NEEDS.get(name, ()), "evaluation.baselines=true")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())["models"]
    assert evaluation["central"]["response_loss"]["all"] != evaluation["base"]["response_loss"]["all"]
    saved = load_file(tmp_path / "run" / "baselines" / "central-00000.safetensors")
    trained = set(Aggregation.resolve(name).trained(0))
    assert {key.rsplit(".", 2)[-2] for key in saved if key.startswith("adapter/")} >= trained
    sizes = {key: tensor.numel() for key, tensor in saved.items() if key.startswith("first/")}
    assert max(sizes.values()) < 2000, "moments of cores, not of factors"


def test_fedkseed_needs_sgd(fedit, recipe, tmp_path) -> None:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "aggregation.name=fedkseed")
    assert done.status == 1
    assert '[client] optimizer = "sgd"' in " ".join(done.stderr.split())
