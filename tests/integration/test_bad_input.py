"""What people get wrong, at the command line: a message that says what, where and how to mend it, and nothing lost."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedit.base import load_base
from fedit.batch import Batch
from fedit.config import ModelConfig
from fedit.interfaces import EngineError
from fedit.model import StackedModel


def options(**overrides: object) -> list[str]:
    """Return ``-o key.sub=value`` for each ``key__sub=value``."""
    return [part for key, value in overrides.items() for part in ("-o", f"{key.replace('__', '.')}={value}")]


@pytest.fixture
def refused(fedit, recipe: Path, tmp_path: Path) -> Callable[..., str]:
    """Run, expect to be refused without a trace, and return the message."""

    def run(error: str, *arguments: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        done = fedit("run", recipe, "--out", tmp_path / "out", *arguments)
        assert done.status == 1, done.stderr
        assert f"error: {error}\n" in done.stderr
        assert done.stdout == ""
        assert sorted(tmp_path.rglob("*")) == before
        return done.stderr

    return run


# -------------------------------------------------------------------------------------------------------------- data


def test_missing_file(refused, tmp_path) -> None:
    message = refused("DataError", *options(data__path=tmp_path / "absent.jsonl"))
    assert f"'{tmp_path / 'absent.jsonl'}': no such file or folder" in message


CONTENTS = {
    "": "{path}: the file has no rows",
    '{"instruction": "a", "response": "b"}\n{"instruction": "a", "respo\n': "{path}:2: not valid JSON at column",
    '[1, 2]\n{"instruction": "a", "response": "b"}\n': "{path}:1: expected an object",
    '{"question": "a", "response": "b"}\n': "{path}:1: no column holds the instruction",
    '{"instruction": "a", "solution": "b"}\n': "{path}:1: no column holds the response",
    '{"instruction": "a", "response": "b"}\n{"instruction": "a", "response": " "}\n': "{path}:2: the response is empty",
    '{"instruction": "a", "response": null}\n': "{path}:1: the response is empty",
    '{"instruction": "a", "response": "b"}\n' * 3: "Lower [data] test_per_category",
}


@pytest.mark.parametrize("content", CONTENTS)
def test_unusable_rows(refused, tmp_path, data, content: str) -> None:
    data.write_text(content)
    assert CONTENTS[content].format(path=data) in refused("DataError", *options(data__test_per_category=5))


def test_a_column_that_the_file_lacks(refused, data) -> None:
    message = refused("DataError", *options(data__columns='{ instruction = "question" }'))
    assert f"{data}:1: no column 'question'" in message
    assert "Columns found: instruction, response, category, client" in message


def test_a_client_that_loses_all_its_rows_is_named(fedit, recipe, data) -> None:
    """Its responses are longer than the cutoff; the others stay, so this is no refusal, but it is said."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    for row in rows:
        row["response"] *= 20 if row["client"] == "b" else 1
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = fedit("check", recipe, *options(partition__name="natural", data__max_length=40))
    assert done.status == 0, done.stderr
    assert "Clients of whose rows none is left: b" in done.stderr
    assert "2 clients" in done.stderr


def test_more_clients_than_rows(refused) -> None:
    assert "500 clients need at least 500 rows, got 20" in refused("DataError", *options(partition__num_clients=500))


def test_no_row_fits(refused) -> None:
    assert "Raise max_length" in refused("DataError", *options(data__max_length=8))


def test_a_category_named_as_the_whole(refused, data) -> None:
    """Refused before training, not after hours of it."""
    data.write_text(data.read_text().replace('"category": "ab"', '"category": "all"'))
    assert "category is named 'all'" in refused("DataError")


# ------------------------------------------------------------------------------------------------------ configuration


def test_unknown_recipe(fedit) -> None:
    done = fedit("run", "defualt")
    assert done.status == 1
    assert "Did you mean 'default'?" in done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"adapter__rank": 0}, "adapter.rank"),
        ({"adapter__rnak": 4}, "unknown key 'adapter.rnak'. Did you mean 'rank'?"),
        ({"aggregation__name": "flexlra"}, "[aggregation] name = 'flexlra' is unknown. Did you mean 'flexlora'?"),
        ({"client__learning_rate": "fast"}, "client.learning_rate"),
        ({"rounds": 0}, "rounds"),
        ({"adapter__rank": "[2, 4]"}, "needs clients of equal rank"),
        ({"cohort__min_updates": 4}, "min_updates = 4 can never be reached"),
    ],
)
def test_wrong_keys(refused, overrides: dict[str, object], message: str) -> None:
    assert message in refused("ConfigError", *options(**overrides))


def test_a_plugin_file_that_is_not_there(refused) -> None:
    assert "--plugin absent.py: no such Python file" in refused("ConfigError", "--plugin", "absent.py")


# -------------------------------------------------------------------------------------------------- model and machine


def test_unknown_device(refused) -> None:
    message = refused("EngineError", *options(engine__device="gpu"))
    assert "[engine] device = 'gpu' is not usable here" in message
    assert "Nothing was saved yet." in message
    assert "--resume" not in message


def test_a_quantised_base_without_a_gpu_or_its_package(refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the weights are read; on a GPU the package has to be there."""
    message = refused("EngineError", *options(model__quantization="nf4", engine__device="cpu"))
    assert "[model] quantization = 'nf4' needs a CUDA GPU, and [engine] device is cpu" in message
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError, match=r"pip install 'fedit\[quantization\]'"):
        load_base(ModelConfig(path="absent", quantization="int8"), torch.device("cuda"))


def test_memory_that_does_not_hold_the_base(refused) -> None:
    message = refused("MemoryShortageError", *options(engine__memory_gb=0.0001))
    assert "[engine] memory: 0.00 GB do not hold the base" in message
    assert "raise [engine] memory_gb" in message
    assert "Nothing was saved yet." in message


def test_targets_that_match_nothing(refused) -> None:
    message = refused("EngineError", *options(adapter__target_modules='["q_prj"]'))
    assert "'q_prj' matches no layer. Did you mean 'q_proj'?" in message
    assert "--resume" not in message


def test_missing_model_folder(refused, tmp_path) -> None:
    message = refused("EngineError", *options(model__path=tmp_path / "absent"))
    assert f"[model] path = '{tmp_path / 'absent'}': no such folder" in message


@pytest.fixture
def model_copy(tiny_model_folder: Path, tmp_path: Path) -> Path:
    shutil.copytree(tiny_model_folder, tmp_path / "model")
    return tmp_path / "model"


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("model.safetensors", "the folder has no usable weights (it holds: config.json,"),
        ("config.json", "the folder has no usable"),
    ],
)
def test_model_folder_that_lacks_a_file(refused, model_copy: Path, file: str, message: str) -> None:
    (model_copy / file).unlink()
    assert message in refused("EngineError", *options(model__path=model_copy))


def test_weights_that_were_cut_off(refused, model_copy: Path) -> None:
    """A download that stopped half-way."""
    weights = model_copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    assert "the folder has no usable weights" in refused("EngineError", *options(model__path=model_copy))


def test_code_in_a_models_folder_is_not_run(refused, model_copy: Path, tmp_path: Path) -> None:
    """And nobody is asked whether it shall be."""
    trace = tmp_path / "trace"
    trace.mkdir()
    (model_copy / "code.py").write_text(f"from pathlib import Path\nPath({str(trace / 'run')!r}).touch()\n")
    config = json.loads((model_copy / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": dict.fromkeys(("AutoConfig", "AutoModelForCausalLM"), "code.Mine")}
    (model_copy / "config.json").write_text(json.dumps(config))
    message = refused("EngineError", *options(model__path=model_copy))
    assert "the folder has no usable configuration" in message
    assert not (trace / "run").exists()


def test_tokenizer_without_eos(refused, model_copy: Path) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (model_copy / name).is_file():
            described = json.loads((model_copy / name).read_text())
            described.pop("eos_token", None)
            (model_copy / name).write_text(json.dumps(described))
    assert "end-of-sequence token" in refused("DataError", *options(model__path=model_copy))


# ------------------------------------------------------------------------------------------------------ output folder


@pytest.mark.parametrize("name", ["file", "file/below", "file/far/below"])
def test_output_that_cannot_be_written(fedit, recipe, tmp_path, name: str) -> None:
    (tmp_path / "file").write_text("precious")
    done = fedit("run", recipe, "--out", tmp_path / name)
    assert done.status == 1
    assert f"--out {tmp_path / name} cannot be written: {tmp_path / 'file'}: Not a directory" in done.stderr
    assert (tmp_path / "file").read_text() == "precious"


def test_output_with_other_files(refused, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("precious")
    message = refused("ConfigError")
    assert f"--out {tmp_path / 'out'} holds other files already" in message
    assert "--resume" not in message


def test_output_with_a_run(fedit, refused, recipe, tmp_path) -> None:
    out = tmp_path / "out"
    assert fedit("run", recipe, "--out", out, *options(evaluation__baselines="false")).status == 0
    assert f"fedit run --resume {out}" in refused("ConfigError")
    assert f"fedit run --resume {out}" in refused("ConfigError", *options(rounds=7))


@pytest.mark.parametrize("command", ["report", "chat", "ui", "serve", "export", "resume"])
@pytest.mark.parametrize("kind", ["absent", "empty"])
def test_a_folder_that_is_no_run(fedit, tmp_path, command: str, kind: str) -> None:
    folder = tmp_path / kind
    if kind == "empty":
        folder.mkdir()
    more = {"export": ["--merged", tmp_path / "merged"]}.get(command, [])
    done = fedit(*(["run", "--resume"] if command == "resume" else [command]), folder, *more)
    assert done.status == 1
    assert f"{folder} is not a run: it {'is no folder' if kind == 'absent' else 'holds no config.json'}" in done.stderr
    assert not (tmp_path / "merged").exists()
    assert not folder.exists() or list(folder.iterdir()) == []


def test_a_refused_run_does_not_use_up_its_name(fedit, recipe) -> None:
    """Without --out the folder is runs/<recipe>; the attempt that failed must not turn the next into runs/recipe-2."""
    assert fedit("run", recipe, *options(engine__device="gpu")).status == 1
    assert fedit("run", recipe, *options(evaluation__baselines="false")).status == 0
    assert fedit("run", recipe, *options(evaluation__baselines="false")).status == 0
    assert sorted(path.name for path in Path("runs").iterdir()) == ["recipe", "recipe-2"]


# ---------------------------------------------------------------------------------------------------------- divergence


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Make the training loss of every row that holds a character NaN, in its gradient too."""
    measured = StackedModel.token_losses

    def install(character: str) -> None:
        def token_losses(self: StackedModel, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
            losses, row = measured(self, batch)
            (token,) = self.tokenizer.encode(character, add_special_tokens=False)
            ids = batch.input_ids.flatten()
            poisoned = torch.stack([ids[start : start + length].eq(token).any() for start, length in batch.rows])
            if torch.is_grad_enabled():
                losses = losses * torch.ones_like(losses).masked_fill(poisoned[row], float("nan"))
            return losses, row

        monkeypatch.setattr(StackedModel, "token_losses", token_losses)

    return install


def test_one_client_diverges(fedit, recipe, tmp_path, poison) -> None:
    """It is a recorded failure of every round; the rest go on."""
    poison("~")
    natural = options(partition__name="natural")
    done = fedit("run", recipe, "--out", tmp_path / "out", *natural)
    assert done.status == 0, done.stderr
    rounds = [json.loads(line) for line in (tmp_path / "out" / "rounds.jsonl").read_text().splitlines()]
    assert [list(line["failures"]) for line in rounds] == [["c"], ["c"]]
    assert all("not finite at step" in line["failures"]["c"] for line in rounds)
    # As text: the square brackets of the advice must not be taken for a style.
    assert "2/3 clients" in done.stderr
    assert re.search(r"c failed: (loss|gradient) is not finite at step 1; lower \[client\] learning_rate", done.stderr)
    evaluation = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(evaluation["models"]) == {"base", "local", "federated"}
    assert set(evaluation["models"]["local"]["per_client"]) == {"a", "b"}
    assert set(evaluation["failures"]) == {"local/c", "central"}
    assert (evaluation["gap_closed"], evaluation["gap_closed_reason"]) == (None, "not evaluated: central")
    assert (
        evaluation["models"]["federated"]["response_loss"]["all"] < evaluation["models"]["base"]["response_loss"]["all"]
    )
    page = (tmp_path / "out" / "report.html").read_text()
    assert "is not finite at step" in page


def test_a_client_that_diverges_leaves_no_trace_in_the_adapter(fedit, recipe, data, tmp_path, poison) -> None:
    """Up to rounding, since rows of other clients share its batches."""
    (tmp_path / "test.jsonl").write_text('{"instruction": "f", "response": "g"}\n')
    run = ["run", recipe, *options(partition__name="natural", data__test_path=tmp_path / "test.jsonl")]
    run += options(evaluation__baselines="false", evaluation__max_new_tokens=0)
    poison("~")
    assert fedit(*run, "--out", tmp_path / "with").status == 0
    data.write_text("".join(line for line in data.read_text().splitlines(keepends=True) if '"c"' not in line))
    assert fedit(*run, "--out", tmp_path / "without").status == 0
    one, other = (load_file(tmp_path / out / "adapter/adapter_model.safetensors") for out in ("with", "without"))
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert (tensor - other[name]).norm() < 1e-4 * tensor.norm()


def test_all_clients_diverge(fedit, recipe, tmp_path, poison, monkeypatch) -> None:
    out = tmp_path / "a run"
    with monkeypatch.context():
        poison("?")
        done = fedit("run", recipe, "--out", out)
    monkeypatch.undo()
    assert done.status == 1
    assert "error: RoundError" in done.stderr
    assert "Round 1 got 0 usable updates of 3" in done.stderr
    assert "0: loss is not finite at step 1" in done.stderr
    assert f"fedit run --resume '{out}'" in done.stderr
    monkeypatch.chdir(tmp_path)
    assert not (out / "rounds.jsonl").exists() or (out / "rounds.jsonl").read_text() == ""


def test_an_absurd_learning_rate(fedit, recipe, tmp_path) -> None:
    """Without any patch: the first round's adapters are huge, and no client can train on from them."""
    done = fedit("run", recipe, "--out", tmp_path / "out", *options(client__learning_rate=1e30))
    assert done.status == 1
    assert "error: RoundError" in done.stderr
    assert "learning_rate" in done.stderr
    assert "Traceback" not in done.stderr
    assert fedit("report", tmp_path / "out").status == 0


def test_a_full_disk(fedit, recipe, tmp_path, monkeypatch) -> None:
    """At the second checkpoint; the first is intact, and with room again the run is resumed."""
    from fedit import files

    written = files.os.fsync
    out = tmp_path / "out"

    def full(descriptor: int) -> None:
        if (out / "checkpoints" / ".round-00002.safetensors.partial").exists():
            raise OSError(28, "No space left on device")
        written(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", full)
        done = fedit("run", recipe, "--out", out)
    assert done.status == 1
    assert "round-00002.safetensors could not be written: No space left on device" in done.stderr
    assert f"fedit run --resume {out}" in done.stderr
    assert [file.name for file in (out / "checkpoints").iterdir()] == ["round-00001.safetensors"]
    assert fedit("run", "--resume", out).status == 0
    assert len((out / "rounds.jsonl").read_text().splitlines()) == 2
