"""`fedit evaluate`: the numbers of lm-eval's own models, of all models at once, from the command line to the report."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from fedit.benchmarks import answers, harness, tasks
from fedit.benchmarks.answers import Request
from fedit.benchmarks.harness import HarnessModel
from fedit.data import encode_all
from fedit.evaluation.checks import exact_match
from fedit.evaluation.metrics import rouge_l
from fedit.interfaces import ConfigError, DataError, Example, Turn
from fedit.run_models import RunModels

CHOICES = """
task: choices
dataset_path: json
test_split: test
training_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: [a, b, cd]
doc_to_target: answer
metadata: {version: 2}
"""
IFEVAL = [
    (["punctuation:no_comma"], [{}], "No commas here.", True, True),
    (["punctuation:no_comma", "keywords:existence"], [{}, {"keywords": ["wool"]}], "Wool, silk", False, False),
    (["change_case:english_lowercase"], [{}], "Sure:\nthis is all in small letters.", False, True),
    (["detectable_format:title"], [{}], "<<The wool>>\nIt is warm.", True, True),
]
"""Instructions, their arguments, an answer, whether all are followed strictly and loosely"""


@pytest.fixture
def run(fedit, recipe, tmp_path) -> Path:
    done = fedit("run", recipe, "--out", tmp_path / "run", "-o", "evaluation.max_new_tokens=0")
    assert done.status == 0, done.stderr
    return tmp_path / "run"


@pytest.fixture
def choices(tmp_path) -> Path:
    """A folder of YAML with one multiple-choice task, and its rows."""
    folder = tmp_path / "yaml"
    folder.mkdir()
    rows = [{"question": f"What is {number}?", "answer": number % 3} for number in range(7)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = f"dataset_kwargs: {{data_files: {{test: {folder / 'rows.jsonl'}}}}}\n"
    (folder / "choices.yaml").write_text(CHOICES + files)
    return folder


def likelihood(*pairs: tuple[str, str]) -> list[Instance]:
    return [Instance("loglikelihood", {}, pair, number) for number, pair in enumerate(pairs)]


def generation(options: dict[str, Any], *prompts: str) -> list[Instance]:
    return [Instance("generate_until", {}, (prompt, dict(options)), number) for number, prompt in enumerate(prompts)]


def rolling(*texts: str) -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (text,), number) for number, text in enumerate(texts)]


@pytest.fixture
def models(run: Path) -> RunModels:
    return RunModels.open(run, ["base", "local/2", "central", "federated"])


@pytest.fixture
def reference(run: Path, tiny_model_folder: Path) -> HFLM:
    """The federated model as lm-eval loads it itself."""
    # Its constructor is decorated, so that a type checker sees no parameters.
    load = cast("Any", HFLM)
    adapter = str(run / "adapter")
    return load(pretrained=str(tiny_model_folder), peft=adapter, dtype="float32", device="cpu", batch_size=3)


# ------------------------------------------------------------------------------------- as lm-eval's own models do


def test_likelihoods_are_those_of_the_adapter_in_lm_eval(models: RunModels, reference: Any) -> None:
    model = HarnessModel(models)
    model.name = "federated"
    likeliest = reference.generate_until(generation({"max_gen_toks": 2}, "ab 1 c?"))[0]
    pairs = (
        ("ab 1 c?", likeliest),
        ("ab 1 c?\n", "ba"),
        ("ab 1 c?", "\n"),
        ("a space ", "before"),
        ("", "no context"),
        ("Which?", "a"),
        ("Which?", "b"),
        ("Which?", "c"),
        ("Which?", "cd"),
        ("long " * 120, "and its end"),
        ("ünïcode", "ß€"),
        ("<s>spelt", " out"),
        ("again", " and"),
        ("again", " and"),
    )
    expected = reference.loglikelihood(likelihood(*pairs), disable_tqdm=True)
    got = model.loglikelihood(likelihood(*pairs))
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert got[0][1]
    assert not got[1][1]
    np.testing.assert_allclose([value for value, _ in got], [value for value, _ in expected], atol=1e-4)


def test_a_texts_own_likelihood_is_taken_in_windows_of_the_context(models: RunModels, reference: Any) -> None:
    model = HarnessModel(models)
    model.name = "federated"
    texts = ("short", "of several windows " * 60, "")
    expected = reference.loglikelihood_rolling(rolling(*texts), disable_tqdm=True)
    np.testing.assert_allclose(model.loglikelihood_rolling(rolling(*texts)), expected, rtol=1e-5)
    assert expected[1] < expected[0] < 0


@pytest.mark.parametrize("apart", [1, 2, 3])
def test_generated_text_is_that_of_the_adapter_in_lm_eval(models: RunModels, reference: Any, apart: int) -> None:
    model = HarnessModel(models)
    model.name = "federated"
    prompts = ("ab 1 c?\n", "Say something.", "x", "long " * 120)
    whole = reference.generate_until(generation({"max_gen_toks": 24, "until": []}, *prompts), disable_tqdm=True)
    stops = [text[4 : 4 + apart] for text in whole[:2]]
    assert all(stops)
    asked = generation({"max_gen_toks": 24, "until": stops}, *prompts)
    expected = reference.generate_until(asked, disable_tqdm=True)
    assert expected != whole
    assert model.generate_until(asked) == expected
    assert model.generate_until(generation({"max_gen_toks": 24, "until": []}, *prompts)) == whole


def test_a_benchmarks_numbers_are_those_of_the_adapter_in_lm_eval(models, reference, choices) -> None:
    loaded = tasks.load_tasks(["choices"], [choices])
    loaded["tasks"]["choices"].set_config(key="num_fewshot", value=2)
    found: list[Any] = []
    model = HarnessModel(models)
    for each in (reference, model):
        model.name = "federated"
        loaded["tasks"]["choices"].set_fewshot_seed(seed=1)
        found.append(evaluate(lm=each, task_dict=loaded))
    expected, got = ([sample["filtered_resps"] for sample in result["samples"]["choices"]] for result in found)
    assert found[0]["results"] == found[1]["results"]
    np.testing.assert_allclose(got, expected, atol=1e-4)


# ------------------------------------------------------------------------------------------------- all models at once


def test_all_models_answer_when_the_first_is_asked(models: RunModels, run: Path, monkeypatch) -> None:
    model = HarnessModel(models)
    passes, forward = [], models.model.base.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        passes.append(1)
        return forward(*arguments, **named)

    monkeypatch.setattr(models.model.base, "forward", counted)
    asked = likelihood(("Which?", "a"), ("Which?", "b"), ("And?", "cd"))
    got = {}
    for name in model.names:
        model.name = name
        got[name] = model.loglikelihood(asked)
        assert len(passes) == 1
    assert len({values[0][0] for values in got.values()}) == 4
    for name in model.names:
        alone = HarnessModel(dataclasses.replace(models, adapters={name: models.adapters[name]}))
        np.testing.assert_allclose(
            [value for value, _ in alone.loglikelihood(asked)], [value for value, _ in got[name]], atol=1e-4
        )
    model.name = "base"
    assert model.loglikelihood(asked[:1]) != got["base"]  # others are asked anew


def test_continuations_with_the_same_input_are_fed_once(models: RunModels) -> None:
    model = models.model
    asked = [(np.array([5, 6, 7], np.int32), np.array([last], np.int32)) for last in (8, 9, 10)]
    answers.likelihoods(models, asked)
    before = model.processed_tokens
    answers.likelihoods(models, asked[:1])
    one = model.processed_tokens - before
    answers.likelihoods(models, asked)
    assert model.processed_tokens - before == 2 * one
    assert answers.likelihoods(models, [(asked[0][0], asked[0][1][:0])])["base"] == [(0.0, True)]


def test_adapters_that_cannot_share_a_pass_are_asked_one_after_the_other(fedit, recipe, tmp_path) -> None:
    done = fedit(
        "run", recipe, "--out", tmp_path / "run", "-o", "evaluation.max_new_tokens=0", "-o", "aggregation.name=flora"
    )
    assert done.status == 0, done.stderr
    models = RunModels.open(tmp_path / "run", ["base", "federated"])
    got = answers.likelihoods(models, [(np.array([0, 20], np.int32), np.array([21, 22], np.int32))])
    alone = RunModels.open(tmp_path / "run", ["federated"])
    again = answers.likelihoods(alone, [(np.array([0, 20], np.int32), np.array([21, 22], np.int32))])
    assert got["federated"] == again["federated"]
    assert got["federated"] != got["base"]


def test_what_a_context_cannot_hold_is_cut_or_refused(models: RunModels, caplog) -> None:
    model = HarnessModel(models)
    with pytest.raises(DataError, match="600 tokens, the model's context 512"):
        model.loglikelihood(likelihood(("a", "b" * 600)))
    model.loglikelihood(likelihood(("a" * 600, "b"), ("a", "b")))
    assert "1 of 2 requests exceed" in caplog.text
    (text,) = model.generate_until(generation({"max_gen_toks": 2000}, "a" * 300))
    assert 0 < len(text) <= 256
    assert "half of it" in caplog.text


# --------------------------------------------------------------------------------------------------- the run's template


@pytest.fixture
def requests(monkeypatch) -> list[Request]:
    """What the models are asked, as ids."""
    seen: list[Request] = []

    def noted(models: RunModels, asked: Sequence[Request]) -> dict[str, list[tuple[float, bool]]]:
        seen.extend(asked)
        return {name: [(0.0, True)] * len(asked) for name in models.adapters}

    monkeypatch.setattr(harness, "likelihoods", noted)
    return seen


def test_a_prompt_of_the_template_is_tokenised_as_in_training(models: RunModels, requests: list[Request]) -> None:
    model = HarnessModel(models)
    text = model.apply_chat_template(
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name it."},
            {"role": "assistant", "content": "Ilka"},
            {"role": "user", "content": "Where?\n\n### Input:\nIn Galder."},
        ]
    )
    assert text == "Be brief.\n\nName it.\nIlka\n\nWhere?\n\nIn Galder.\n"
    model.loglikelihood(likelihood((text, "Galder"), (text + " ", "Galder")))
    example = Example((Turn("Name it.", "Ilka"), Turn("Where?", "Galder", "In Galder.")), system="Be brief.")
    (trained,), _ = encode_all([example], models.config.data, models.model.tokenizer)
    # Training ends with an end-of-sequence token; the text alone has none behind its first response either.
    np.testing.assert_array_equal(np.concatenate(requests[0]), trained.input_ids[:-1])
    np.testing.assert_array_equal(requests[0][0], trained.prompt_ids)
    assert len(np.concatenate(requests[1])) == len(trained) - 2 + len(" ")


def test_a_prompt_may_begin_the_answer(models: RunModels, requests: list[Request]) -> None:
    model = HarnessModel(models)
    chat = [{"role": "user", "content": "Name it."}, {"role": "assistant", "content": "It is"}]
    text = model.apply_chat_template(chat, add_generation_prompt=False)
    assert text == "Name it.\nIt is"
    model.loglikelihood(likelihood((text, " a zoll")))
    (trained,), _ = encode_all(
        [Example((Turn("Name it.", "It is a zoll"),))], models.config.data, models.model.tokenizer
    )
    np.testing.assert_array_equal(np.concatenate(requests[0]), trained.input_ids[:-1])


# ------------------------------------------------------------------------------------------------- the command


def test_a_run_is_evaluated_and_its_report_says_so(fedit, run: Path, choices: Path) -> None:
    done = fedit("evaluate", run, "--tasks", "pasture,choices", "--include-path", choices, "--limit", "4", "--json")
    assert done.status == 0, done.stderr
    found = json.loads(done.stdout)
    assert json.loads((run / "benchmarks.json").read_text())["tasks"] == found
    assert list(found) == ["pasture", "choices"]
    assert (found["choices"]["version"], found["choices"]["num_rows"], found["choices"]["of_rows"]) == (2, 4, 7)
    assert found["pasture"]["template"] == "plain"
    names = [metric["name"] for metric in found["pasture"]["metrics"]]
    assert names == ["exact_match", "rouge_l"]
    measured = found["choices"]["metrics"][0]
    models = list(measured["models"])
    assert models[0] == "base"
    assert models[1].startswith("local/")
    assert models[2:] == ["central", "federated"]
    assert list(measured["differences"]) == [f"federated_minus_{name}" for name in models[:3]]
    lines = (run / "benchmarks" / "choices" / "central.jsonl").read_text().splitlines()
    assert [json.loads(line)["doc_id"] for line in lines] == [0, 1, 2, 3]
    assert "Local-only" in done.stderr
    page = (run / "report.html").read_text()
    assert "<h2>Benchmarks</h2>" in page
    assert "4 of 7 rows" in page
    # Other tasks stay, the same task is measured again.
    done = fedit(
        "evaluate",
        run,
        "--tasks",
        choices / "choices.yaml",
        "--models",
        "base",
        "--fewshot",
        "1",
        "--no-apply-template",
    )
    assert done.status == 0, done.stderr
    assert done.stdout == ""
    now = json.loads((run / "benchmarks.json").read_text())["tasks"]
    assert now["pasture"] == found["pasture"]
    assert (now["choices"]["num_fewshot"], now["choices"]["num_rows"], now["choices"]["template"]) == (1, 7, None)
    assert list(now["choices"]["metrics"][0]["models"]) == ["base"]
    assert [file.name for file in (run / "benchmarks" / "choices").iterdir()] == ["base.jsonl"]
    assert (run / "benchmarks" / "pasture" / "federated.jsonl").is_file()


def test_rows_of_a_file_are_judged_as_the_run_judges_its_own(fedit, run: Path, data: Path) -> None:
    done = fedit(
        "evaluate", run, "--tasks", "instructions", "--data", f"instructions={data}", "--models", "federated", "--json"
    )
    assert done.status == 0, done.stderr
    task = json.loads(done.stdout)["instructions"]
    assert task["num_rows"] == 24
    assert task["metrics"][0]["differences"] == {}
    lines = (run / "benchmarks" / "instructions" / "federated.jsonl").read_text().splitlines()
    answered = [json.loads(line) for line in lines]
    expected = [exact_match(each["resps"][0][0], each["doc"]["response"]) for each in answered]
    assert [bool(each["exact_match"]) for each in answered] == expected
    value = {metric["name"]: metric["models"]["federated"]["value"] for metric in task["metrics"]}
    scores = [rouge_l(each["resps"][0][0].strip(), each["doc"]["response"]) for each in answered]
    assert value == pytest.approx({"exact_match": np.mean(expected), "rouge_l": np.mean(scores)})


def test_rows_of_a_file_come_before_those_that_a_task_makes(fedit, run: Path, tmp_path) -> None:
    path = tmp_path / "one.jsonl"
    path.write_text(json.dumps({"instruction": "ab 1?", "response": "1 ba"}) + "\n")
    done = fedit("evaluate", run, "--tasks", "pasture", "--data", f"pasture={path}", "--models", "base", "--json")
    assert done.status == 0, done.stderr
    assert json.loads(done.stdout)["pasture"]["num_rows"] == 1
    (line,) = (run / "benchmarks" / "pasture" / "base.jsonl").read_text().splitlines()
    assert json.loads(line)["doc"]["instruction"] == "ab 1?"


@pytest.mark.parametrize(
    ("task", "function", "options", "message"),
    [
        ("task: [", "", [], "broken.yaml"),
        ("task: [", "", ["--data", "{task}=own.py"], "ParserError"),
        ("task: broken\ndoc_to_text: !function own.question", "def question(row:", [], "own"),
        ("task: broken\ndoc_to_text: !function own.question", "question = 1 / 0", [], "ZeroDivisionError"),
    ],
)
def test_a_task_that_cannot_be_loaded(fedit, run: Path, tmp_path, task, function, options, message) -> None:
    (tmp_path / "broken.yaml").write_text(task)
    (tmp_path / "own.py").write_text(function)
    Path("own.py").touch()
    options = [option.format(task=tmp_path / "broken.yaml") for option in options]
    done = fedit("evaluate", run, "--tasks", tmp_path / "broken.yaml", "--models", "base", *options)
    assert done.status == 1
    assert "cannot be loaded" in done.stderr
    assert message in done.stderr
    assert "--data TASK=FILE" in done.stderr


def test_the_example_of_the_documentation_runs(fedit, run: Path, repository: Path) -> None:
    page = (repository / "docs" / "how-to" / "benchmarks.md").read_text(encoding="utf-8")
    for name, kind in (("quiz/rows.jsonl", "json"), ("quiz/quiz.yaml", "yaml"), ("quiz/quiz.py", "python")):
        path = Path(name)
        path.parent.mkdir(exist_ok=True)
        block = re.search(f'```{kind} title="{name}"\n(.*?)```', page, re.DOTALL)
        assert block is not None, name
        path.write_text(block[1], encoding="utf-8")
    assert "fedit evaluate runs/default --tasks quiz --include-path quiz" in page
    done = fedit("evaluate", run, "--tasks", "quiz", "--include-path", "quiz", "--models", "base,federated", "--json")
    assert done.status == 0, done.stderr
    metrics = json.loads(done.stdout)["quiz"]["metrics"]
    assert [metric["name"] for metric in metrics] == ["rouge_l", "is_short"]


def test_a_run_without_baselines_has_two_models(fedit, recipe, tmp_path, choices) -> None:
    out = tmp_path / "alone"
    done = fedit("run", recipe, "--out", out, "-o", "evaluation.max_new_tokens=0", "-o", "evaluation.baselines=false")
    assert done.status == 0, done.stderr
    done = fedit("evaluate", out, "--tasks", "choices", "--include-path", choices, "--json")
    assert done.status == 0, done.stderr
    assert list(json.loads(done.stdout)["choices"]["metrics"][0]["models"]) == ["base", "federated"]
    done = fedit("evaluate", out, "--tasks", "choices", "--include-path", choices, "--models", "local")
    assert done.status == 1
    assert "run without baselines" in done.stderr


def test_clients_that_have_models_of_their_own_are_evaluated_each(fedit, recipe, tmp_path, choices) -> None:
    out = tmp_path / "own"
    done = fedit("run", recipe, "--out", out, "-o", "evaluation.max_new_tokens=0", "-o", "aggregation.name=fedsa-lora")
    assert done.status == 0, done.stderr
    done = fedit("evaluate", out, "--tasks", "choices", "--include-path", choices, "--json")
    assert done.status == 0, done.stderr
    models = list(json.loads(done.stdout)["choices"]["metrics"][0]["models"])
    assert models[0] == "base"
    assert models[2:] == ["central", "federated/0", "federated/1", "federated/2"]


def test_bad_input_is_refused_with_what_to_do(fedit, run: Path, choices: Path, tmp_path, monkeypatch) -> None:
    def refused(*arguments: str | Path) -> str:
        done = fedit("evaluate", *arguments)
        assert done.status == 1
        assert "Traceback" not in done.stderr
        return " ".join(done.stderr.split())

    some = ("--include-path", choices)
    assert "is not a run" in refused(tmp_path, "--tasks", "pasture")
    assert "--limit 0" in refused(run, "--tasks", "pasture", "--limit", "0")
    assert "--fewshot -1" in refused(run, "--tasks", "pasture", "--fewshot", "-1")
    assert "Did you mean 'federated'" in refused(run, "--tasks", "pasture", "--models", "federatd")
    assert "is no folder" in refused(run, "--tasks", "pasture", "--include-path", tmp_path / "none")
    assert "there is no such file" in refused(run, "--tasks", tmp_path / "none.yaml")
    assert "expected TASK=PATH" in refused(run, "--tasks", "pasture", "--data", "rows.jsonl")
    assert "not among the tasks: pasture" in refused(run, "--tasks", "pasture", "--data", "ifeval=rows.jsonl")
    assert "there is no such file" in refused(run, "--tasks", "choices", *some, "--data", "choices=none.jsonl")
    (tmp_path / "rows.txt").touch()
    assert "ends in .json" in refused(run, "--tasks", "choices", *some, "--data", f"choices={tmp_path / 'rows.txt'}")
    assert "--data instructions=FILE" in refused(run, "--tasks", "instructions")
    unsafe = (choices / "choices.yaml").read_text() + "unsafe_code: true\n"
    (tmp_path / "unsafe.yaml").write_text(unsafe)
    assert "runs code that the model writes" in refused(run, "--tasks", tmp_path / "unsafe.yaml")
    beams = CHOICES.replace("multiple_choice", "generate_until\ngeneration_kwargs: {num_beams: 4}")
    rows = ("--data", f"{tmp_path / 'beams.yaml'}={choices / 'rows.jsonl'}")
    (tmp_path / "beams.yaml").write_text(beams)
    assert "num_beams cannot be followed" in refused(run, "--tasks", tmp_path / "beams.yaml", *rows)
    (run / "adapter").rename(run / "gone")
    assert "--resume" in refused(run, "--tasks", "pasture")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install 'fedit[benchmarks]'" in refused(run, "--tasks", "pasture")


@pytest.mark.slow
def test_tasks_of_lm_eval_are_found_by_name_and_take_data_of_a_file(fedit, run: Path, tmp_path) -> None:
    with pytest.raises(ConfigError, match="Did you mean 'ifeval'"):
        tasks.load_tasks(["ifevol"])
    with pytest.raises(DataError, match=r"gsm8k cannot be loaded: ConnectionError.*\n.*--data TASK=FILE"):
        tasks.load_tasks(["gsm8k"])
    path = tmp_path / "input_data.jsonl"
    write_ifeval(path)
    done = fedit("evaluate", run, "--tasks", "ifeval", "--data", f"ifeval={path}", "--models", "base", "--json")
    assert done.status == 0, done.stderr
    task = json.loads(done.stdout)["ifeval"]
    names = [metric["name"] for metric in task["metrics"]]
    levels = ("prompt_level_strict_acc", "inst_level_strict_acc", "prompt_level_loose_acc", "inst_level_loose_acc")
    assert names == list(levels)
    loaded = tasks.load_tasks(["ifeval"], data={"ifeval": path})
    result: Any = evaluate(lm=Recited({row["prompt"]: said for row, said in ifeval_rows()}), task_dict=loaded)
    got = [result["results"]["ifeval"][f"{name},none"] for name in levels]
    # Of four prompts and five instructions.
    assert got == [0.5, 0.6, 0.75, 0.8]


def ifeval_rows() -> list[tuple[dict[str, Any], str]]:
    return [
        ({"key": number, "prompt": f"Prompt {number}", "instruction_id_list": ids, "kwargs": kwargs}, said)
        for number, (ids, kwargs, said, _, _) in enumerate(IFEVAL)
    ]


def write_ifeval(path: Path) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in ifeval_rows()))


class Recited(LM):
    """Says what it was told to say."""

    def __init__(self, said: dict[str, str]) -> None:
        super().__init__()
        self._said = said

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return [self._said[request.arguments[0]] for request in requests]

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        raise AssertionError("IFEval asks for text alone")

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        raise AssertionError("IFEval asks for text alone")
