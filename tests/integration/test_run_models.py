"""The models of a run folder, opened by name, are those that the run evaluated; they are asked together."""

from __future__ import annotations

import itertools
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fedit.config import parse_config
from fedit.evaluation.heldout import response_losses
from fedit.generation import Continuation, Sampling, generate, stream
from fedit.interfaces import ConfigError, DataError, EngineError, Example, Turn
from fedit.prepare import prepare_data
from fedit.report import RunFolder
from fedit.run_models import RunModels, model_names, resolve_names

RULES = {
    "fedit": (),
    "mixed ranks": ("adapter.rank=[2, 1]", "aggregation.name=flexlora"),
    "a side": ("aggregation.name=flora",),
    "cores": ("aggregation.name=fed-sb",),
    "own factors": ("aggregation.name=fedsa-lora",),
    "own models": ("objective.name=ditto",),
}


@pytest.fixture
def finished(fedit, recipe, tmp_path) -> Path:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "evaluation.max_new_tokens=0")
    assert done.status == 0, done.stderr
    return tmp_path / "run"


def losses(folder: Path) -> dict[str, float]:
    """The response loss of every model, as the run wrote it."""
    found = {}
    for kind, measured in RunFolder.read(folder).evaluation["models"].items():
        own = measured.get("per_client")
        pairs = [(kind, measured)] if own is None else [(f"{kind}/{client}", each) for client, each in own.items()]
        found |= {name: each["response_loss"]["all"] for name, each in pairs}
    return found


@pytest.mark.parametrize("rule", RULES)
def test_every_model_is_the_one_that_was_evaluated(fedit, recipe, tmp_path, rule: str) -> None:
    options = [part for option in (*RULES[rule], "evaluation.max_new_tokens=0") for part in ("-o", option)]
    done = fedit("run", recipe, "--out", tmp_path / "run", *options)
    assert done.status == 0, done.stderr
    folder, expected = tmp_path / "run", losses(tmp_path / "run")
    names = model_names(folder)
    assert set(names) == set(expected)
    assert len(set(expected.values())) == len(expected)
    models = RunModels.open(folder, names)
    test = prepare_data(models.config).test
    num_tokens = sum(row.num_supervised for row in test)
    for name in names:
        loss = response_losses(models.model, [models.adapters[name]], test).sum() / num_tokens
        assert loss == pytest.approx(expected[name], rel=1e-6), name


def test_local_is_the_median_client(finished) -> None:
    (name,) = resolve_names(finished, ["local"])
    local = {name: loss for name, loss in losses(finished).items() if name.startswith("local/")}
    assert local[name] == np.median(list(local.values()))


def test_models_answer_together_as_they_do_alone(finished) -> None:
    """Each in its own conversation, of another length."""
    names = ["base", "federated", "local/0", "central"]
    models = RunModels.open(finished, names)
    asked = {name: Example((Turn("ab 1?" * (place + 1), ""),)) for place, name in enumerate(names)}
    *_, together = models.answer(asked, 8)
    for name in names:
        *_, alone = models.answer({name: asked[name]}, 8)
        assert alone == {name: together[name]}
    assert len(set(together.values())) > 1


@pytest.mark.parametrize("command", [["chat"], ["export"], ["run", "--resume"]])
def test_a_run_whose_keys_are_unknown_is_of_another_version(fedit, finished, command) -> None:
    described = json.loads((finished / "config.json").read_text())
    described["config"]["oldkey"] = 1
    (finished / "config.json").write_text(json.dumps(described))
    done = fedit(*command, finished, *(["--adapter", finished.parent / "out"] if command == ["export"] else []))
    assert done.status == 1
    assert "unknown key 'oldkey'" in done.stderr
    assert f"{finished} was written by fedit {described['versions']['fedit']}" in " ".join(done.stderr.split())


def test_models_with_different_sides_answer_after_each_other(fedit, recipe, tmp_path) -> None:
    folder = tmp_path / "run"
    assert fedit("run", recipe, "--out", folder, "-o", "aggregation.name=flora").status == 0
    models = RunModels.open(folder, ["base", "federated"])
    asked = Example((Turn("ab 1?", ""),))
    *_, together = models.answer({"base": asked, "federated": asked}, 5)
    for name in ("base", "federated"):
        *_, alone = models.answer({name: asked}, 5)
        assert alone == {name: together[name]}


def test_the_oldest_turns_are_left_out_where_the_context_is_full(finished) -> None:
    models = RunModels.open(finished)
    turns = [Turn(f"{number} " + "x" * 100, "y") for number in range(8)]
    shown = models.prompt(Example((*turns, Turn("last?", ""))), 64)
    text = str(models.model.tokenizer.decode(shown))
    assert len(shown) + 64 <= 512
    assert text.endswith("last?\n")
    assert "7 xx" in text
    assert "0 xx" not in text
    with pytest.raises(DataError, match="context is 512"):
        models.prompt(Example((Turn("x" * 600, ""),)), 64)


def test_a_stream_grows_and_ends_where_generation_does(finished) -> None:
    models = RunModels.open(finished, ["base", "federated"])
    models.model.fill(list(models.adapters.values()))
    prompts = [np.array([0, 70, 71, 72], np.int32), np.array([0, 80], np.int32)]
    for sampling in (Sampling(), Sampling(temperature=1.5, top_p=0.9, seed=3)):
        whole = generate(models.model, prompts, [0, 1], 12, sampling)
        continuations = list(stream(models.model, prompts, [0, 1], 12, sampling))
        steps = [[row.text for row in rows] for rows in continuations]
        assert steps[-1] == whole
        assert all(row.is_finished or row.num_tokens == 12 for row in continuations[-1])
        assert 2 < len(steps) <= 13
        for earlier, later in itertools.pairwise(steps):
            assert all(after.startswith(before) for before, after in zip(earlier, later, strict=True))


def test_sampling_draws_by_its_seed_and_leaves_other_draws_alone(finished) -> None:
    models = RunModels.open(finished)
    models.model.fill(list(models.adapters.values()))
    prompts = [np.array([0, 70, 71, 72], np.int32)]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    drawn = {seed: generate(models.model, prompts, [0], 20, Sampling(1.0, 1.0, seed)) for seed in (1, 2)}
    again = generate(models.model, prompts, [0], 20, Sampling(1, 1, 1))
    free = [generate(models.model, prompts, [0], 20, Sampling(1.0)) for _ in range(2)]
    assert torch.equal(torch.rand(3), expected)
    assert drawn[1] == again != drawn[2]
    assert free[0] != free[1]
    nucleus = generate(models.model, prompts, [0], 20, Sampling(1.0, top_p=1e-6, seed=1))
    assert nucleus == generate(models.model, prompts, [0], 20)  # of the likeliest token alone


def test_a_stream_that_is_closed_stops(finished, monkeypatch) -> None:
    models = RunModels.open(finished)
    models.model.fill(list(models.adapters.values()))
    calls = 0
    forward = models.model.base.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(*arguments, **named)

    monkeypatch.setattr(models.model.base, "forward", counted)
    answers = stream(models.model, [np.array([0, 70], np.int32)], [0], 400)
    next(answers)
    answers.close()
    assert calls < 400


def test_a_row_that_nobody_reads_ends_alone(finished) -> None:
    models = RunModels.open(finished)
    models.model.fill(list(models.adapters.values()))
    prompt = np.array([0, 70, 71, 72], np.int32)
    *_, (alone,) = stream(models.model, [prompt], [0], 30)
    seen: list[list[Continuation]] = []
    is_unwanted = lambda row: row == 1 and len(seen) > 3
    seen.extend(stream(models.model, [prompt] * 2, [0, 0], 30, is_unwanted=is_unwanted))
    read, unread = seen[-1]
    assert read == alone
    assert read.num_tokens > 20
    assert unread.num_tokens < 20


def test_more_models_on_the_same_base(finished) -> None:
    models = RunModels.open(finished, ["base"])
    more = models.with_models(["federated", "local/0"])
    assert more.model is models.model
    assert list(more.adapters) == ["base", "federated", "local/0"]
    assert more.with_models(["federated"]) is more
    opened = RunModels.open(finished, ["local/0", "federated"])
    for name, adapter in opened.adapters.items():
        assert adapter is not None
        own = more.adapters[name]
        assert own is not None
        assert all(torch.equal(tensor, own.tensors[key]) for key, tensor in adapter.tensors.items())
    with pytest.raises(ConfigError, match="no model 'local/9'"):
        models.with_models(["local/9"])


@pytest.mark.parametrize(
    ("temperature", "top_p", "message"),
    [(-1.0, 1.0, "temperature = -1.0"), (0.0, 0.0, "top_p = 0.0"), (1.0, 1.5, "top_p = 1.5")],
)
def test_impossible_sampling_is_refused(temperature: float, top_p: float, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        Sampling(temperature, top_p)


def test_what_cannot_be_opened_is_said(fedit, recipe, finished, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"no model 'local/9'\. Did you mean 'local/"):
        RunModels.open(finished, ["local/9"])
    shutil.copytree(finished, tmp_path / "unfinished")
    shutil.rmtree(tmp_path / "unfinished" / "adapter")
    with pytest.raises(ConfigError, match="Finish it with `fedit run --resume"):
        model_names(tmp_path / "unfinished")
    described = json.loads((finished / "config.json").read_text())
    del described["model"]["weights_sha256"]
    (tmp_path / "unfinished" / "config.json").write_text(json.dumps(described))
    with pytest.raises(ConfigError, match="older version"):
        model_names(tmp_path / "unfinished")

    plain = tmp_path / "plain"
    assert fedit("run", recipe, "--out", plain, "-o", "evaluation.baselines=false").status == 0
    for name in ("local", "central"):
        with pytest.raises(ConfigError, match="run without baselines"):
            RunModels.open(plain, [name])


def test_another_base_is_refused(finished, tiny_model_folder, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    other = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        other.lm_head.weight += 1
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    other.save_pretrained(tmp_path / "model")
    described = json.loads((finished / "config.json").read_text())
    described["config"]["model"]["path"] = str(tmp_path / "model")
    assert parse_config(described["config"])
    (finished / "config.json").write_text(json.dumps(described))
    with pytest.raises(EngineError, match="run on another base"):
        RunModels.open(finished)


def test_a_run_goes_on_by_the_command_that_it_was_made_with(fedit, asked_run, tmp_path) -> None:
    run = shutil.copytree(asked_run, tmp_path / "run")
    command = "fedit federation run --server SERVER --resume"
    done = fedit("federation", "run", "--server", tmp_path, "--resume", run)
    assert (done.status, f"`fedit run --resume {run}`" in done.stderr) == (1, True), done.stderr
    (run / "partition.json").write_text('{"run": "x", "clients": {"north/1": {"rows": 3}}}')
    done = fedit("run", "--resume", run)
    assert (done.status, f"`{command} {run}`" in done.stderr) == (1, True), done.stderr
    shutil.rmtree(run / "adapter")
    with pytest.raises(ConfigError, match=command):
        model_names(run)
