"""Model cards of made-up runs: what the Hub reads in them, what people do, and what must not be there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from fedit.evaluation.metrics import Prediction, summarise
from fedit.report import RunFolder, write_report
from fedit.report.card import model_card, write_card

STATEMENT = {
    "epsilon": 2.0,
    "delta": 1e-5,
    "unit": "all rows of a client",
    "adjacency": "one client added or removed",
    "sampling": "Poisson, probability 0.5 a round",
    "rounds": 2,
    "noise_multiplier": 1.25,
    "clip_norm": None,
    "clipping": "fixed",
    "trust": "the server sees single updates and adds the noise",
    "accountant": "an accountant",
    "noise": "the operating system's",
}


def answered(model: str, passed: int) -> list[Prediction]:
    return [
        Prediction(model, index, "ab", "q", "", "r", "r", index < passed, float(index < passed), 2.0 + index, 2)
        for index in range(4)
    ]


def make_run(
    folder: Path,
    *,
    partition: dict[str, Any] | None = None,
    epsilon: float | None = None,
    on_hub: bool = False,
    **config,
) -> Path:
    """Write a run of two rounds and two clients, with an adapter; its base and its data came from the Hub, or not."""
    models = {name: answered(name, passed) for name, passed in
              {"base": 0, "local/a": 1, "local/b": 2, "central": 4, "federated": 3}.items()}  # fmt: skip
    described = {
        "config": {"rounds": 2, "model": {"path": "builtin:cria"}, "data": {"path": "builtin:pasture"}, **config},
        "recipe": "default",
        "plugin_files": [],
        "on_hub": {"model": on_hub, "data": on_hub},
        "versions": {"fedit": "0.1.0"},
        "hardware": {"dtype": "float32", "device": "cpu", "cpu_count": 2},
        "model": {"weights_sha256": "abc123", "parameters": 9, "adapter_parameters": 1},
    }
    counts = {"rows": 30, "truncated": 4, "dropped": 5}
    holdings = {name: {"rows": 15, "categories": {"ab": 10, "c|d": 5}} for name in "ab"}
    line = {"cohort": ["a"], "tokens": 700, "test_loss": None, "epsilon": epsilon, "failures": {}}
    line |= {"train_loss": 1.0, "update_norm": 1.0, "aggregation_loss": 0.0, "bytes_up": 1, "bytes_down": 1}
    files = {
        "config.json": described,
        "partition.json": partition
        or {"clients": holdings, "test": {"ab": 4}, "encoding": {"train": counts, "test": counts}},
        "evaluation.json": summarise(models, dict.fromkeys(models, 1400), 0),
    }
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    (folder / "rounds.jsonl").write_text("".join(json.dumps({"round": n, **line}) + "\n" for n in (1, 2)))
    return folder


def card_of(folder: Path, model: str = "federated", kind: Any = "adapter", licence: str = "unknown") -> str:
    return model_card(RunFolder.read(folder), model, kind, folder / "adapter", licence)


def test_what_the_hub_reads(tmp_path) -> None:
    folder = make_run(tmp_path, on_hub=True, model={"path": "meta/base-1B"}, data={"path": "lab/rows"})
    data = ModelCard(card_of(folder, licence="apache-2.0")).data.to_dict()
    assert data["base_model"] == "meta/base-1B"
    assert data["base_model_relation"] == "adapter"
    assert data["library_name"] == "peft"
    assert data["datasets"] == ["lab/rows"]
    assert data["license"] == "apache-2.0"
    assert data["pipeline_tag"] == "text-generation"
    (index,) = data["model-index"]
    metrics = {metric["name"]: metric["value"] for metric in index["results"][0]["metrics"]}
    assert metrics == {"Response loss": 1.75, "Exact match": 0.75, "ROUGE-L": 0.75}
    merged = ModelCard(card_of(folder, "local/b", "merged")).data.to_dict()
    assert (merged["library_name"], merged["base_model_relation"]) == ("transformers", "finetune")
    assert merged["model-index"][0]["results"][0]["metrics"][1]["value"] == 0.5


def test_no_path_of_this_machine_and_no_name_that_the_hub_does_not_know(tmp_path) -> None:
    (tmp_path / "base").mkdir()
    rows = tmp_path / "rows.jsonl"
    rows.touch()
    folder = make_run(tmp_path / "run", model={"path": str(tmp_path / "base")}, data={"path": str(rows)})
    card = card_of(folder)
    assert str(tmp_path) not in card
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data
    assert data["license"] == "unknown"
    assert "The base, base, is not on the Hugging Face Hub" in card
    assert "abc123" in card


def test_the_data_and_what_became_of_it(tmp_path) -> None:
    card = card_of(make_run(tmp_path))
    assert "30 training rows of 2 clients" in card
    assert "| ab | 20 | 4 |" in card
    assert "| c\\|d | 10 | 0 |" in card
    assert "cut to 512 tokens: 4" in card
    assert "could not be learned from: 5" in card


def test_every_model_with_its_interval_and_this_one_marked(tmp_path) -> None:
    folder = make_run(tmp_path)
    lines = [line for line in card_of(folder).splitlines() if line.startswith("| ") and "%" in line]
    assert [line.split(" | ")[0].removeprefix("| ") for line in lines] == [
        "Base",
        "Local-only, mean of 2",
        "Centralised",
        "**Federated** (this model)",
    ]
    assert "75.0% (25.0–100.0%)" in lines[-1]
    own = [line for line in card_of(folder, "local/a").splitlines() if "(this model)" in line]
    assert len(own) == 1
    assert own[0].startswith("| **local/a** (this model) | 1.750")


def test_a_relative_path_is_no_name_on_the_hub(tmp_path) -> None:
    """Wherever the card is written, and whatever became of the folder."""
    folder = make_run(tmp_path, model={"path": "models/base"}, data={"path": "clinic-7/patients.jsonl"})
    card = card_of(folder)
    data = ModelCard(card).data.to_dict()
    assert "base_model" not in data
    assert "datasets" not in data
    assert "models/base" not in card
    assert "clinic-7" not in card


def test_of_an_older_run_the_form_of_a_name_decides(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    data_path = "~/clinic-7/patients.jsonl"
    folder = make_run(tmp_path / "run", model={"path": "meta/base-1B"}, data={"path": data_path})
    described = json.loads((folder / "config.json").read_text())
    del described["on_hub"]
    (folder / "config.json").write_text(json.dumps(described))
    card = card_of(folder)
    data = ModelCard(card).data.to_dict()
    assert data["base_model"] == "meta/base-1B"
    assert "datasets" not in data
    assert "clinic-7" not in card
    (tmp_path / "meta" / "base-1B").mkdir(parents=True)
    assert "base_model" not in ModelCard(card_of(folder)).data.to_dict()


def test_no_privacy_is_claimed_for_what_never_left_its_client(tmp_path) -> None:
    folder = make_run(tmp_path, epsilon=1.5)
    partition = json.loads((folder / "partition.json").read_text())
    (folder / "partition.json").write_text(json.dumps(partition | {"privacy": STATEMENT}))
    card = card_of(folder, "federated/a")
    assert "differential privacy hides" not in card
    assert "None is claimed: the privacy of the run is that of what clients send" in card


@pytest.mark.parametrize("model", ["federated", "central"])
def test_privacy_is_that_of_the_federated_model_alone(tmp_path, model) -> None:
    folder = make_run(tmp_path, epsilon=1.5)
    partition = json.loads((folder / "partition.json").read_text())
    (folder / "partition.json").write_text(json.dumps(partition | {"privacy": STATEMENT}))
    card = card_of(folder, model)
    assert ("(1.5, 1e-05)-differential privacy hides all rows of a client" in card) == (model == "federated")
    assert ("| Noise multiplier | 1.25 |" in card) == (model == "federated")
    assert ("None: the privacy of the run is that of its federated model." in card) == (model == "central")


def test_no_privacy_is_said(tmp_path) -> None:
    assert "## Privacy\n\nNone. The rows stayed with their clients" in card_of(make_run(tmp_path))


def test_a_run_across_sites_tells_no_names_and_no_counts(tmp_path) -> None:
    clients = {name: {"rows": 123, "categories": {}} for name in ("north-clinic", "south-clinic")}
    folder = make_run(tmp_path, partition={"run": "x", "clients": clients}, on_hub=True, data={"path": "lab/rows"})
    (folder / "evaluation.json").unlink()
    card = card_of(folder)
    assert "Rows of 2 clients at sites of their own" in card
    assert "Instructions: the sites' own rows." in card
    assert "lab" not in card, "the server reads no rows; those that its recipe names are nobody's"
    assert "clinic" not in card
    assert "123 " not in card
    assert "Not evaluated." in card


def test_the_prompt(tmp_path) -> None:
    folder = make_run(tmp_path)
    assert "this folder has no chat template that does it" in card_of(folder)
    (folder / "adapter" / "chat_template.jinja").touch()
    card = card_of(folder)
    assert "tokenizer.apply_chat_template(chat" in card
    assert "do_sample=False" in card, "as the answers that were measured"
    assert "Template `alpaca`: Headers ``### Instruction:``" in card
    assert "--chat-template" in card


def test_the_report_writes_the_cards_of_what_is_exported(tmp_path) -> None:
    folder = make_run(tmp_path)
    for client in ("a", "b%2E"):
        (folder / "adapters" / client).mkdir(parents=True)
    (folder / "adapters" / "b%2E" / "adapter_config.json").write_text("{}")
    write_report(folder)
    assert "tuned by federated learning" in (folder / "adapter" / "README.md").read_text()
    assert "client b.'s own" in (folder / "adapters" / "b%2E" / "README.md").read_text()
    assert not (folder / "adapters" / "a" / "README.md").exists()
    before = (folder / "adapter" / "README.md").read_bytes()
    write_card(RunFolder.read(folder), "federated", "adapter", folder / "adapter")
    assert (folder / "adapter" / "README.md").read_bytes() == before
