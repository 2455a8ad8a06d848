"""Whole experiments on the tiny model through the command line, and what others can load of the result."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedit import cli
from fedit.base import load_base, load_tokenizer
from fedit.config import RunConfig, load_config, load_plugins, parse_config
from fedit.export import load_adapter
from fedit.generation import generate
from fedit.interfaces import plugins
from fedit.model import StackedModel
from fedit.prepare import FederatedData, prepare_data

load_plugins()

CATEGORIES = {"ab", "cde"}
FAST = ["-o", "evaluation.baselines=false", "-o", "evaluation.max_new_tokens=0"]


def read(run: Path) -> dict[str, Any]:
    return json.loads((run / "evaluation.json").read_text())


def rounds(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "rounds.jsonl").read_text().splitlines()]


def configured(run: Path) -> RunConfig:
    return parse_config(json.loads((run / "config.json").read_text())["config"])


@pytest.fixture
def finished(fedit, recipe: Path, tmp_path: Path) -> Path:
    """A small run without baselines."""
    assert fedit("run", recipe, "--out", tmp_path / "run", *FAST).status == 0
    return tmp_path / "run"


# ------------------------------------------------------------------------------------------------- whole experiments


@pytest.mark.parametrize("aggregation", ["fedit", "flexlora"])
@pytest.mark.parametrize("partition", plugins("partition"))
def test_every_partition(fedit, recipe, tmp_path, partition: str, aggregation: str) -> None:
    run = tmp_path / "run"
    # Choosing a partition by name drops the parameters of the recipe's own.
    own = [] if partition == "natural" else ["-o", "partition.num_clients=3"]
    chosen = ["-o", f"partition.name={partition}", *own, "-o", f"aggregation.name={aggregation}"]
    done = fedit("run", recipe, "--out", run, *chosen, "-o", "client.local_epochs=1", "-o", "client.local_steps=none")
    assert done.status == 0, done.stderr
    assert_complete(run, num_clients=3)
    assert_equal_budgets(run)


def assert_complete(run: Path, num_clients: int) -> None:
    names = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
    assert names >= {
        "adapter/adapter_config.json",
        "adapter/adapter_model.safetensors",
        "adapter/tokenizer.json",
        "answers.jsonl",
        "checkpoints/round-00002.safetensors",
        "config.json",
        "evaluation.json",
        "partition.json",
        "report.html",
        "rounds.jsonl",
        "timings.jsonl",
    }
    evaluation = read(run)
    assert list(evaluation["models"]) == ["base", "local", "central", "federated"]
    assert "gap_closed" in evaluation
    assert set(evaluation["num_test_rows"]) == {"all", *CATEGORIES}
    clients = json.loads((run / "partition.json").read_text())["clients"]
    assert len(clients) == num_clients
    per_client = evaluation["models"]["local"]["per_client"]
    assert set(per_client) == set(clients)
    for measured in [*evaluation["models"].values(), *per_client.values()]:
        for metric in ("response_loss", "exact_match", "rouge_l"):
            assert set(measured[metric]) == {"all", *CATEGORIES}
            assert all(np.isfinite(value) for value in measured[metric].values())
        assert isinstance(measured["tokens"], int)
    lines = (run / "answers.jsonl").read_text().splitlines()
    assert len(lines) == (3 + num_clients) * evaluation["num_test_rows"]["all"]
    assert len(rounds(run)) == 2


def assert_equal_budgets(run: Path) -> None:
    """All clients take part, so the local-only models see exactly the federation's tokens; central, to a batch."""
    evaluation = read(run)
    federated = evaluation["models"]["federated"]["tokens"]
    assert federated == sum(line["tokens"] for line in rounds(run)) > 0
    local = evaluation["models"]["local"]
    assert sum(client["tokens"] for client in local["per_client"].values()) == federated
    config = configured(run)
    longest = max(len(example) for example in prepare_data(config).pooled)
    assert abs(evaluation["models"]["central"]["tokens"] - federated) <= config.client.batch_size * longest


def test_local_steps_and_a_sampled_cohort(fedit, recipe, tmp_path) -> None:
    """Two of six clients in each of two rounds leave two or more that were never drawn: named, and baselined too."""
    run = tmp_path / "run"
    options = ["-o", "partition.num_clients=6", "-o", "cohort.size=2", "-o", "client.local_steps=3", "--seed", "4"]
    done = fedit("run", recipe, "--out", run, *options)
    assert done.status == 0, done.stderr
    drawn = {client for line in rounds(run) for client in line["cohort"]}
    never = json.loads((run / "partition.json").read_text())["never_sampled"]
    assert len(never) >= 2
    assert drawn | set(never) == set("012345")
    assert not drawn & set(never)
    assert f"Clients never sampled with this seed: {len(never)} of 6" in done.stderr
    assert set(read(run)["models"]["local"]["per_client"]) == set("012345")
    assert all(len(line["cohort"]) == 2 for line in rounds(run))
    # Each local-only client takes the steps it expects to: 2 rounds of 3 steps, drawn with probability 1/3.
    assert configured(run).client.local_steps == 3


@pytest.mark.parametrize("sampling", ["poisson", "round_robin"])
def test_other_samplings_of_the_cohort(fedit, recipe, tmp_path, sampling: str) -> None:
    """Poisson at a third of three clients draws nobody in 3 rounds of 10; the report says so and the run goes on."""
    run = tmp_path / "run"
    chosen = [f"cohort.sampling={sampling}", "cohort.size=1", "rounds=10", "client.moments=keep"]
    done = fedit("run", recipe, "--out", run, *FAST, *[part for option in chosen for part in ("-o", option)])
    assert done.status == 0, done.stderr
    sizes = [len(line["cohort"]) for line in rounds(run)]
    assert sizes == [1] * 10 if sampling == "round_robin" else len(set(sizes)) > 1 and 0 in sizes
    assert (sampling == "poisson") == ("0/0 clients, train loss none" in done.stderr)
    assert (run / "report.html").is_file()


def test_mixed_ranks(fedit, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    done = fedit("run", recipe, "--out", run, "-o", "adapter.rank=[4, 1]", "-o", "aggregation.name=flexlora")
    assert done.status == 0, done.stderr
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["r"] == 4
    first = rounds(run)[0]
    assert first["failures"] == {}
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(4 in tensor.shape for tensor in tensors.values())
    # Two clients of rank 4 and one of rank 1.
    whole = (run / "adapter" / "adapter_model.safetensors").stat().st_size
    assert 2.2 * whole < first["bytes_up"] < 2.6 * whole


def test_one_client_with_all_rows_is_centralised_tuning(fedit, recipe, tmp_path) -> None:
    """In one round: the federation's only client is the central model, up to the order of the rows.

    More rounds differ: a client's AdamW starts each round with empty moments. With a batch that holds all rows the
    order does not matter either, so the two have the same adapter up to the rounding of the update's subtraction.
    """
    run = tmp_path / "run"
    options = ["rounds=1", "partition.num_clients=1", "client.local_steps=4", "client.batch_size=64"]
    done = fedit("run", recipe, "--out", run, *[part for option in options for part in ("-o", option)])
    assert done.status == 0, done.stderr
    models = read(run)["models"]
    assert models["federated"]["tokens"] == models["central"]["tokens"] == models["local"]["per_client"]["0"]["tokens"]
    federated = models["federated"]["response_loss"]["all"]
    for other in ("central", "local"):
        assert models[other]["response_loss"]["all"] == pytest.approx(federated, rel=1e-5)
    assert federated < models["base"]["response_loss"]["all"] - 0.01


PLUGIN = '''
from typing import ClassVar

import numpy as np

from fedit.aggregation import FedIT
from fedit.interfaces import Partition, Segment, Template


class Halves(Partition):
    """The first rows and the others [not random]."""

    name: ClassVar[str] = "halves"
    share: float = 0.5

    def split(self, examples, rng):
        border = int(self.share * len(examples))
        return {"first": np.arange(border), "rest": np.arange(border, len(examples))}


class Arrow(Template):
    """Instruction => response."""

    name: ClassVar[str] = "arrow"

    def render(self, example, tokenizer):
        turn = example.turns[-1]
        return [Segment(f"{turn.instruction} => ", False), Segment(turn.response, True)]


class Doubled(FedIT):
    """FedIT with steps twice as long."""

    name: ClassVar[str] = "doubled"

    def aggregate(self, adapter, updates, rng):
        result = super().aggregate(adapter, updates, rng)
        return type(result)({name: 2 * step for name, step in result.delta.items()}, metrics=result.metrics)
'''


def test_plugins_of_ones_own(fedit, recipe, tmp_path, registry) -> None:
    (tmp_path / "mine.py").write_text(PLUGIN)
    chosen = ["partition.name=halves", "partition.share=0.25", "data.template=arrow", "aggregation.name=doubled"]
    options = ["--plugin", tmp_path / "mine.py", *[part for option in chosen for part in ("-o", option)]]
    done = fedit("run", recipe, "--out", tmp_path / "run", *options, *FAST)
    assert done.status == 0, done.stderr
    clients = json.loads((tmp_path / "run" / "partition.json").read_text())["clients"]
    assert {client: holding["rows"] for client, holding in clients.items()} == {"first": 5, "rest": 15}
    plain = fedit("run", recipe, "--out", tmp_path / "plain", *options, *FAST, "-o", "aggregation.name=fedit")
    assert plain.status == 0, plain.stderr
    doubled, single = (rounds(tmp_path / name)[0]["update_norm"] for name in ("run", "plain"))
    assert doubled == pytest.approx(2 * single, rel=1e-5)
    # What is there to choose from, with the square brackets of its description.
    listed = fedit("plugins", "--plugin", tmp_path / "mine.py", "--json")
    (halves,) = [item for item in json.loads(listed.stdout) if item["name"] == "halves"]
    assert halves["parameters"] == {"share": 0.5}
    assert halves["description"] == "The first rows and the others [not random]."
    # The run remembers the file: reporting, chatting and resuming need no --plugin.
    assert fedit("run", "--resume", tmp_path / "run").status == 0


# -------------------------------------------------------------------------------------------------- what others load


PROMPTS = ["ab 1 a", "cde 2 b", "Why?"]


def prompt_ids(tokenizer: Any) -> list[np.ndarray]:
    return [np.array(tokenizer(prompt)["input_ids"], dtype=np.int32) for prompt in PROMPTS]


def generated(model: Any, tokenizer: Any) -> list[list[int]]:
    """Return greedy token ids, one prompt at a time as a user would."""
    answers = []
    for ids in prompt_ids(tokenizer):
        output = model.generate(
            input_ids=torch.from_numpy(ids.astype(np.int64))[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
            max_new_tokens=12,
            do_sample=False,
            pad_token_id=tokenizer.eos_token_id,
        )
        answers.append(output[0, len(ids) :].tolist())
    return answers


def test_adapter_and_merged_model_load_elsewhere_and_answer_alike(fedit, recipe, tmp_path, tiny_model_folder) -> None:
    """Trained hard enough to answer otherwise than the base does; all three ways give the same tokens."""
    run = tmp_path / "run"
    assert fedit("run", recipe, "--out", run, *FAST, "-o", "client.learning_rate=0.1", "-o", "rounds=4").status == 0
    exported = fedit("export", run, "--merged", tmp_path / "merged")
    assert exported.status == 0, exported.stderr
    assert "Merged model" in exported.stderr

    config = configured(run)
    tokenizer = load_tokenizer(str(tiny_model_folder))
    ours = StackedModel(load_base(config.model, torch.device("cpu")), tokenizer, config.adapter)
    ours.write(0, load_adapter(run / "adapter", config))
    expected = generate(ours, prompt_ids(tokenizer), [0] * len(PROMPTS), 12)

    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32).eval()
    untuned = generated(base, tokenizer)
    peft = generated(
        PeftModel.from_pretrained(base, str(run / "adapter")).eval(), AutoTokenizer.from_pretrained(run / "adapter")
    )
    merged_model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    merged = generated(merged_model, AutoTokenizer.from_pretrained(tmp_path / "merged"))
    assert peft == merged
    assert [tokenizer.decode(ids, skip_special_tokens=True) for ids in peft] == expected
    assert peft != untuned
    # The product that lies in the adapter's file is what was added to the base's weights.
    layer = "model.layers.0.mlp.up_proj"
    tensors = load_file(run / "adapter" / "adapter_model.safetensors")
    a, b = (tensors[f"base_model.model.{layer}.lora_{x}.weight"] for x in "AB")
    plain = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    added = merged_model.get_parameter(f"{layer}.weight") - plain.get_parameter(f"{layer}.weight")
    torch.testing.assert_close(added, 2 * b @ a, rtol=1e-4, atol=1e-6)


def test_exporting_does_not_overwrite(fedit, finished, tmp_path) -> None:
    (tmp_path / "file").write_text("precious")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("precious")
    for target in ("file", "full"):
        done = fedit("export", finished, "--merged", tmp_path / target)
        assert done.status == 1
        assert str(tmp_path / target) in done.stderr
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.txt"]
    assert (tmp_path / "file").read_text() == "precious"


@contextmanager
def small_files(num_bytes: int) -> Iterator[None]:
    """Let no file of this process grow beyond `num_bytes`: writing fails half-way, as on a full disk."""
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limit[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def test_exporting_to_a_full_disk_leaves_nothing(fedit, finished, tmp_path) -> None:
    merged = tmp_path / "exported" / "merged"
    with small_files(3000):
        done = fedit("export", finished, "--merged", merged)
    assert done.status == 1
    assert f"{merged} could not be written" in done.stderr
    assert "File too large" in done.stderr
    assert list(merged.parent.iterdir()) == []
    assert fedit("export", finished, "--merged", merged).status == 0


def test_a_disk_that_is_full_at_the_adapter(fedit, finished) -> None:
    expected = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(finished / "adapter")
    (finished / "report.html").unlink()
    for limit, file in ((3000, ""), (9000, "/adapter_model.safetensors"), (20_000, "/../report.html")):
        with small_files(limit):
            done = fedit("run", "--resume", finished)
        assert done.status == 1
        path = os.path.normpath(f"{finished / 'adapter'}{file}")
        assert f"{path} could not be written: " in done.stderr
        assert not Path(path).is_file()
        assert f"fedit run --resume {finished}" in done.stderr
    assert fedit("run", "--resume", finished).status == 0
    assert (finished / "adapter" / "adapter_model.safetensors").read_bytes() == expected


def test_exporting_an_unfinished_run(fedit, finished, tmp_path) -> None:
    (finished / "adapter" / "adapter_config.json").unlink()
    done = fedit("export", finished, "--merged", tmp_path / "merged")
    assert done.status == 1
    assert "holds no adapter" in done.stderr
    assert not (tmp_path / "merged").exists()


# ------------------------------------------------------------------------------------------------- the other commands


def test_report_again(fedit, finished) -> None:
    (finished / "report.html").unlink()
    done = fedit("report", finished)
    assert done.status == 0
    assert f"Report: {finished / 'report.html'}\n" in done.stderr
    page = (finished / "report.html").read_text()
    assert "<html" in page
    assert not re.search(r"""(src|href)=["']https?://[^"']*\.(js|css|png|woff)""", page)


def test_check(fedit, recipe, tmp_path) -> None:
    done = fedit("check", recipe, "--json")
    assert done.status == 0
    assert "14 adapted layers. Ready to run." in done.stderr
    assert set(json.loads(done.stdout)["clients"]) == {"0", "1", "2"}
    refused = fedit("check", recipe, "-o", 'adapter.target_modules=["q_prj"]')
    assert refused.status == 1
    assert "Did you mean 'q_proj'" in refused.stderr
    assert not (tmp_path / "work" / "runs").exists()


def test_partition(fedit, recipe, tmp_path) -> None:
    done = fedit("partition", recipe, "--json", "--out", tmp_path / "x.svg")
    assert done.status == 0
    summary = json.loads(done.stdout)
    assert sum(client["rows"] for client in summary["clients"].values()) == 20
    assert summary["test"] == {"ab": 2, "cde": 2}
    picture = ET.parse(tmp_path / "x.svg").getroot()
    assert picture.tag == "{http://www.w3.org/2000/svg}svg"
    text = (tmp_path / "x.svg").read_text()
    assert "var(" not in text, "the colours of the report's page are unknown outside it"
    assert {"ab", "cde"} <= {element.text for element in picture.iter() if element.tag.endswith("text")}
    assert float(picture.attrib["width"].removesuffix("pt")) > 100
    assert "xlink:" not in text


def test_partition_into_a_folder_that_is_not_there(fedit, recipe, tmp_path) -> None:
    done = fedit("partition", recipe, "--out", tmp_path / "absent" / "x.svg")
    assert done.status == 1
    assert str(tmp_path / "absent" / "x.svg") in done.stderr


def test_plugins_are_listed(fedit) -> None:
    listed = json.loads(fedit("plugins", "--json").stdout)
    kinds = {"template", "partition", "objective", "attack", "aggregation", "server_optimizer"}
    assert {item["kind"] for item in listed} == kinds
    assert {item["name"] for item in listed if item["kind"] == "aggregation"} == set(plugins("aggregation"))
    assert all(item["description"] for item in listed)
    table = fedit("plugins")
    assert table.status == 0
    assert "flexlora" in table.stdout


def test_output_for_scripts(fedit, recipe, tmp_path) -> None:
    """Without a terminal: JSON alone on stdout, plain lines on stderr, no control sequences."""
    done = fedit("run", recipe, "--out", tmp_path / "a [b]", "--json")
    assert done.status == 0
    result = json.loads(done.stdout)
    assert result["folder"] == str(tmp_path / "a [b]")
    assert result["models"] == read(tmp_path / "a [b]")["models"]
    assert "\x1b" not in done.stderr
    lines = done.stderr.splitlines()
    assert any(re.match(r"round 1/2: 3/3 clients, train loss \d\.\d+, held-out loss \d\.\d+, ", line) for line in lines)
    titles = ["Federated tuning", "Local-only tuning", "Centralised tuning", "Evaluation"]
    assert [line.partition(":")[0] for line in lines if line.partition(":")[0] in titles] == titles
    assert f"Report:  {tmp_path / 'a [b]' / 'report.html'}" in lines


def test_help_of_every_command(fedit) -> None:
    for command in ("run", "check", "partition", "report", "export", "chat", "ui", "serve", "plugins"):
        done = fedit(command, "--help")
        assert done.status == 0
        assert f"fedit {command}" in done.stdout
    assert fedit("--version").status == 0


def test_library_use_without_the_command_line(recipe: Path, tmp_path: Path) -> None:
    from fedit.experiment import Event, PhaseStarted, run_experiment

    events: list[Event] = []
    config = load_config(str(recipe))
    data: FederatedData = prepare_data(config)
    result = run_experiment(config, tmp_path / "run", data, events.append)
    assert [event.phase for event in events if isinstance(event, PhaseStarted)] == [
        "federated",
        "local",
        "central",
        "evaluation",
    ]
    assert result.evaluation == read(tmp_path / "run")
    assert cli.app.name == ("fedit",)
