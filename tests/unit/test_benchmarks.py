"""What tasks ask for, how rows are judged, what is made of lm-eval's numbers and how they are shown."""

from __future__ import annotations

import io
from typing import Any

import nltk
import numpy as np
import pytest
import torch
from datasets import Dataset
from rich.console import Console

from fedit.benchmarks import rows, tasks
from fedit.benchmarks.folder import combine
from fedit.benchmarks.harness import GenerationSettings
from fedit.builtin import pasture
from fedit.evaluation.metrics import mean_interval
from fedit.generation import GREEDY, Sampling
from fedit.interfaces import ConfigError, DataError
from fedit.report.benchmarks import benchmarks, benchmarks_table


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, GenerationSettings(256, GREEDY, [])),
        ({"until": "\n", "max_new_tokens": 9, "temperature": 0.0}, GenerationSettings(9, GREEDY, ["\n"])),
        ({"until": ["a", "", "b"], "max_gen_toks": 3, "max_tokens": 4}, GenerationSettings(3, GREEDY, ["a", "b"])),
        ({"do_sample": False, "temperature": 0.7, "num_beams": 1}, GenerationSettings(256, GREEDY, [])),
        ({"temperature": 0.7, "top_p": 0.9}, GenerationSettings(256, Sampling(0.7, 0.9, 5), [])),
        ({"do_sample": True}, GenerationSettings(256, Sampling(1.0, 1.0, 5), [])),
    ],
)
def test_generation_is_what_the_task_asks_for(options: dict[str, Any], expected: GenerationSettings) -> None:
    assert GenerationSettings.of(options, 5) == expected


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_any_seed_of_a_run_draws(seed: int) -> None:
    sampling = GenerationSettings.of({"do_sample": True}, seed).sampling
    assert sampling.seed is not None
    torch.Generator().manual_seed(sampling.seed)


def test_what_generation_cannot_follow_is_named() -> None:
    with pytest.raises(ConfigError, match="penalty, top_k cannot be followed"):
        GenerationSettings.of({"top_k": 3, "penalty": 2}, 0)


def test_rows_are_asked_and_judged() -> None:
    row = {"instruction": "Name it.", "context": "In Galder.", "response": "a zoll", "checks": None}
    assert rows.split_context(rows.question(row)) == ("Name it.", "In Galder.")
    assert rows.split_context(rows.question({"instruction": "One.\n\nTwo."})) == ("One.\n\nTwo.", "")
    assert rows.score(row, ["The zoll."]) == {"exact_match": 1.0, "rouge_l": pytest.approx(0.5)}
    assert rows.score({**row, "checks": {"words": 1}}, ["the zoll"])["exact_match"] == 0.0
    assert rows.score({**row, "checks": '{"words": 2}'}, ["a quard"]) == {"exact_match": 1.0, "rouge_l": 0.5}


def test_the_task_pasture_has_the_held_out_rows_of_the_runs_seed() -> None:
    found = rows.pasture(run_seed="3", version=1.0)["test"].to_list()
    assert [row["instruction"] for row in found] == [row["instruction"] for row in pasture.generate(3)[1]]
    assert all(rows.score(row, [row["response"]]) == {"exact_match": 1.0, "rouge_l": 1.0} for row in found)


def test_ifeval_says_at_once_that_it_lacks_the_data_of_nltk(monkeypatch) -> None:
    class Asked:
        eval_docs = Dataset.from_list([{"instruction_id_list": ["length_constraints:number_sentences"]}])

    def missing(name: str) -> None:
        raise LookupError(name)

    task: Any = Asked()
    monkeypatch.setattr(nltk.data, "find", missing)
    with pytest.raises(DataError, match="number_sentences with NLTK's data punkt_tab"):
        tasks._check("ifeval", task)
    monkeypatch.setattr(nltk.data, "find", lambda name: name)
    tasks._check("ifeval", task)


def result(task: str, values: list[float], **more: Any) -> dict[str, Any]:
    """What lm-eval returns of one model."""
    mean = float(np.mean(values))
    return {
        "results": {task: {"alias": task, "sample_len": 4, "acc,none": mean, "acc_stderr,none": 0.25, **more}},
        "samples": {task: [{"filter": "none", "acc": value} for value in values]},
        "group_subtasks": {},
        "versions": {task: 1},
        "n-shot": {task: 5},
        "n-samples": {task: {"original": 8, "effective": 4}},
        "higher_is_better": {task: {"acc": True}},
    }


def test_the_federated_model_is_compared_on_the_same_rows() -> None:
    combined = combine({"base": result("quiz", [0, 1, 0, 0]), "federated": result("quiz", [1, 1, 1, 0])}, 7)["quiz"]
    assert (combined["version"], combined["num_fewshot"], combined["num_rows"], combined["of_rows"]) == (1, 5, 4, 8)
    (metric,) = combined["metrics"]
    assert metric["models"] == {"base": {"value": 0.25, "stderr": 0.25}, "federated": {"value": 0.75, "stderr": 0.25}}
    confidence = mean_interval(np.array([1.0, 0.0, 1.0, 0.0]), 7, "quiz,acc,none")
    assert metric["differences"] == {"federated_minus_base": {"value": 0.5, "confidence": confidence}}
    assert confidence == [0.0, 1.0]


def test_metrics_that_are_no_mean_over_rows_are_not_compared() -> None:
    results = {name: result("quiz", [0, 1, 0, 0]) for name in ("base", "federated")}
    for each in results.values():
        each["results"]["quiz"] |= {"acc,none": 2.7, "acc_stderr,none": "N/A"}
    (metric,) = combine(results, 0)["quiz"]["metrics"]
    assert metric["differences"] == {}
    assert metric["models"]["base"] == {"value": 2.7, "stderr": None}


def test_tasks_of_a_group_with_a_number_are_shown_by_it() -> None:
    one = result("part", [0, 1, 0, 0])
    one["results"] |= {"whole": {"alias": "whole", "sample_len": 4, "acc,none": 0.25}, "names": {"alias": "names"}}
    one |= {"groups": {"whole": {}}, "group_subtasks": {"whole": ["part"], "names": ["whole"]}}
    combined = {name: {**task, "template": None, "lm_eval": "1"} for name, task in combine({"base": one}, 0).items()}
    assert {name: task["group"] for name, task in combined.items()} == {"part": "whole", "whole": None}
    text = io.StringIO()
    Console(width=80, file=text).print(benchmarks_table(combined))
    assert "whole" in text.getvalue()
    assert "1 tasks of these groups" in text.getvalue()
    page = benchmarks(combined)
    assert page is not None
    assert [line["task"] for line in page["lines"]] == ["whole"]
    assert benchmarks({}) is None


def test_a_mean_of_one_row_has_no_interval() -> None:
    assert mean_interval(np.array([1.0]), 0, "x") is None
    assert mean_interval(np.ones(5), 0, "x") == [1.0, 1.0]
