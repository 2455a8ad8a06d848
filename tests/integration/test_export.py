"""What leaves a run: PEFT folders, merged models, GGUF files and uploads of any of its models."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import stat
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
import torch
from hub_server import hub_server
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedit.interfaces import Example, Turn
from fedit.run_models import RunModels

NO_ANSWERS = ["-o", "evaluation.max_new_tokens=0"]


@pytest.fixture
def finished(fedit, recipe: Path, tmp_path: Path) -> Path:
    """A small run with baselines."""
    done = fedit("run", recipe, "--out", tmp_path / "run", *NO_ANSWERS)
    assert done.status == 0, done.stderr
    return tmp_path / "run"


def weights(models: RunModels, name: str) -> dict[str, torch.Tensor]:
    adapter = models.adapters[name]
    assert adapter is not None
    return {f"base_model.model.{tensor}": value for tensor, value in adapter.tensors.items()}


def assert_names_nothing_of_this_machine(folder: Path, tmp_path: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file() and file.suffix != ".safetensors":
            assert str(tmp_path.parent.parent) not in file.read_text(encoding="utf-8"), file


# ---------------------------------------------------------------------------------------------------------- folders


def test_a_run_leaves_a_card_and_a_chat_template(finished) -> None:
    card = ModelCard.load(finished / "adapter" / "README.md")
    assert card.data.to_dict()["library_name"] == "peft"
    assert "(this model)" in card.text
    assert (finished / "adapter" / "chat_template.jinja").is_file()


@pytest.mark.parametrize("name", ["federated", "central", "local/1"])
def test_every_model_of_a_run(fedit, finished, tmp_path, tiny_model_folder, name) -> None:
    """Its own weights and its own card, in both formats, which say the same; no path of this machine."""
    adapter, merged = tmp_path / "out" / "adapter", tmp_path / "out" / "merged"
    done = fedit("export", finished, "--model", name, "--adapter", adapter, "--merged", merged, "--license", "mit")
    assert done.status == 0, done.stderr
    expected = weights(RunModels.open(finished, [name]), name)
    found = load_file(adapter / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[tensor], expected[tensor]) for tensor in expected)
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    tuned = PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32)
    for tensor, value in tuned.state_dict().items():
        torch.testing.assert_close(whole.state_dict()[tensor], value)
    for folder in (adapter, merged):
        card = ModelCard.load(folder / "README.md")
        assert card.data.to_dict()["license"] == "mit"
        assert name.replace("/", "-") in card.text
        assert AutoTokenizer.from_pretrained(folder).chat_template
    assert_names_nothing_of_this_machine(tmp_path / "out", tmp_path)
    assert (
        json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == tiny_model_folder.name
    )


def test_clients_with_factors_of_their_own(fedit, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    assert fedit("run", recipe, "--out", run, *NO_ANSWERS, "-o", "aggregation.name=fedsa-lora").status == 0
    assert "client 2's own" in (run / "adapters" / "2" / "README.md").read_text()
    done = fedit("export", run, "--model", "federated/2", "--adapter", tmp_path / "out")
    assert done.status == 0, done.stderr
    source, copy = (path / "adapter_model.safetensors" for path in (run / "adapters" / "2", tmp_path / "out"))
    assert source.read_bytes() == copy.read_bytes()
    median = fedit("export", run, "--adapter", tmp_path / "other")
    assert "Model: federated/" in median.stderr, "where no client is named it is the median one's, and that is said"


def test_what_a_rule_keeps_beside_the_adapter_goes_along(fedit, recipe, tmp_path) -> None:
    run = tmp_path / "run"
    assert fedit("run", recipe, "--out", run, *NO_ANSWERS, "-o", "aggregation.name=fedex-lora").status == 0
    assert fedit("export", run, "--adapter", tmp_path / "out" / "adapter").status == 0
    assert (tmp_path / "out" / "adapter" / "side" / "adapter_model.safetensors").is_file()
    assert_names_nothing_of_this_machine(tmp_path / "out", tmp_path)
    card = (tmp_path / "out" / "adapter" / "README.md").read_text()
    assert 'set_adapter(["default", "side"])' in card
    assert "vllm" not in card
    refused = fedit("export", run, "--gguf-adapter", tmp_path / "a.gguf", "--llama-cpp", converters(tmp_path, "pass"))
    assert "Use --gguf, the whole model" in refused.stderr


def test_a_run_of_before_there_were_chat_templates(fedit, finished, tmp_path) -> None:
    for name in ("chat_template.jinja", "README.md"):
        (finished / "adapter" / name).unlink()
    done = fedit("export", finished, "--adapter", tmp_path / "a", "--merged", tmp_path / "m")
    assert done.status == 0, done.stderr
    for folder in (tmp_path / "a", tmp_path / "m"):
        assert (folder / "chat_template.jinja").is_file()
        assert (folder / "README.md").is_file()


def test_an_answer_ends_where_the_tuned_one_does(fedit, recipe, tmp_path, tiny_model_folder) -> None:
    """Even if the base's own settings name another end."""
    base = tmp_path / "base"
    shutil.copytree(tiny_model_folder, base)
    settings = json.loads((base / "generation_config.json").read_text())
    (base / "generation_config.json").write_text(json.dumps({**settings, "eos_token_id": 7}))
    run = tmp_path / "run"
    options = ["-o", f"model.path={base}", "-o", "evaluation.baselines=false"]
    assert fedit("run", recipe, "--out", run, *NO_ANSWERS, *options).status == 0
    assert fedit("export", run, "--merged", tmp_path / "merged").status == 0
    assert json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"] == [1, 7]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "Say what to export"),
        (["--model", "cental", "--adapter", "x"], "Did you mean 'central'?"),
        (["--model", "base", "--adapter", "x"], "nothing to export"),
        (["--adapter", "full"], "exists and is no empty folder"),
        (["--public", "--adapter", "x"], "--public is for --push-to-hub"),
        (["--gguf", "x.gguf"], "convert_hf_to_gguf.py, which is not on the PATH"),
        (["--gguf-adapter", "x.gguf", "--llama-cpp", "empty"], "convert_lora_to_gguf.py, which is not in empty"),
        (["--gguf", "full/thesis.txt", "--llama-cpp", "there"], "full/thesis.txt exists"),
        (["--push-to-hub", "name"], "expected NAMESPACE/NAME"),
        (["--push-to-hub", "my lab/name"], "--push-to-hub my lab/name: "),
        (["--push-to-hub", "lab/name"], "needs a token: set HF_TOKEN"),
    ],
)
def test_bad_input(fedit, finished, monkeypatch, tmp_path, options, message) -> None:
    Path("full").mkdir()
    Path("full", "thesis.txt").touch()
    converter = tmp_path / "there" / "convert_hf_to_gguf.py"
    converter.parent.mkdir()
    converter.touch()
    options = [converter.parent if option == "there" else option for option in options]
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    monkeypatch.setenv("PATH", "empty")
    done = fedit("export", finished, *options)
    assert done.status == 1
    assert message in done.stderr
    assert [path.name for path in Path().rglob("*")] == ["full", "thesis.txt"]


def test_an_unfinished_run(fedit, finished) -> None:
    shutil.rmtree(finished / "adapter")
    done = fedit("export", finished, "--adapter", "x")
    assert done.status == 1
    assert "fedit run --resume" in done.stderr
    assert "is not a run" in fedit("export", "nowhere", "--adapter", "x").stderr


# ------------------------------------------------------------------------------------------------- without fedit

ELSEWHERE = """\
import json, sys
sys.modules["fedit"] = None  # any import of it fails
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base, adapter, merged, chats = sys.argv[1:]
answers = []
for chat in json.loads(chats):
    for folder, model in (
        (adapter, PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)),
        (merged, AutoModelForCausalLM.from_pretrained(merged)),
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.eos_token_id)
        answers.append(tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip())
print(json.dumps(answers))
"""


@pytest.mark.slow
def test_loads_without_fedit(fedit, recipe, tmp_path, tiny_model_folder) -> None:
    """In a virtual environment of its own that sees PyTorch, transformers and PEFT: the answers that fedit gives."""
    run, place = tmp_path / "run", tmp_path / "environment"
    options = ["client.learning_rate=0.1", "rounds=4", "evaluation.baselines=false"]
    assert fedit("run", recipe, "--out", run, *NO_ANSWERS, *[x for o in options for x in ("-o", o)]).status == 0
    done = fedit("export", run, "--adapter", tmp_path / "adapter", "--merged", tmp_path / "merged")
    assert done.status == 0, done.stderr

    venv.create(place, with_pip=False)
    (packages,) = place.glob("lib/python*/site-packages")
    (packages / "others.pth").write_text(sysconfig.get_path("purelib") + "\n")
    asked = [Example((Turn("ab 1 a", ""),)), Example((Turn("ab 1 a", "ba"), Turn("cde 2 b", "")), system="Why?")]
    chats = [
        [{"role": "user", "content": "ab 1 a"}],
        [
            {"role": "system", "content": "Why?"},
            {"role": "user", "content": "ab 1 a"},
            {"role": "assistant", "content": "ba"},
            {"role": "user", "content": "cde 2 b"},
        ],
    ]
    arguments = [str(path) for path in (tiny_model_folder, tmp_path / "adapter", tmp_path / "merged")]
    command = [place / "bin" / "python", "-I", "-c", ELSEWHERE, *arguments, json.dumps(chats)]
    answered = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300, check=False)
    assert answered.returncode == 0, answered.stderr
    models = RunModels.open(run)
    expected = []
    for example in asked:
        *_, last = models.answer({"federated": example}, 12)
        expected += [last["federated"]] * 2
    assert json.loads(answered.stdout) == expected
    assert len(set(expected)) == 2, "the two chats are answered otherwise, so the prompt matters"


# ------------------------------------------------------------------------------------------------------------- GGUF


STAND_IN = """\
#!{python}
import json, pathlib, sys
arguments = sys.argv[1:]
target = pathlib.Path(arguments[arguments.index("--outfile") + 1])
source = pathlib.Path(arguments[0])
files = sorted(path.name for path in source.iterdir())
{then}
target.write_text(json.dumps([pathlib.Path(sys.argv[0]).name, arguments, files]))
"""


def converters(folder: Path, then: str) -> Path:
    """Write programs in the place of llama.cpp's, which check their arguments and do `then`."""
    place = folder / "llama.cpp"
    place.mkdir(exist_ok=True)
    for name in ("convert_hf_to_gguf.py", "convert_lora_to_gguf.py"):
        program = place / name
        program.write_text(STAND_IN.format(python=sys.executable, then=then))
        program.chmod(program.stat().st_mode | stat.S_IXUSR)
    return place


@pytest.mark.parametrize("found_by", ["option", "environment", "path"])
def test_what_llama_cpps_programs_are_given(
    fedit, finished, tmp_path, tiny_model_folder, monkeypatch, found_by
) -> None:
    place = converters(tmp_path, "")
    option = ["--llama-cpp", place] if found_by == "option" else []
    monkeypatch.delenv("LLAMA_CPP", raising=False)
    if found_by != "option":
        monkeypatch.setenv("LLAMA_CPP" if found_by == "environment" else "PATH", str(place))
    whole, lora = tmp_path / "out" / "m.gguf", tmp_path / "out" / "a.gguf"
    done = fedit("export", finished, "--gguf", whole, "--gguf-adapter", lora, *option)
    assert done.status == 0, done.stderr
    program, arguments, files = json.loads(whole.read_text())
    assert program == "convert_hf_to_gguf.py"
    assert arguments[1:] == ["--outfile", str(whole.with_name(".m.gguf.partial"))]
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "README.md"} <= set(files)
    program, arguments, files = json.loads(lora.read_text())
    assert program == "convert_lora_to_gguf.py"
    assert arguments[1:3] == ["--base", str(tiny_model_folder)]
    assert {"adapter_config.json", "adapter_model.safetensors"} <= set(files)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.gguf", "m.gguf"]


def test_a_converter_that_fails_is_quoted(fedit, finished, tmp_path) -> None:
    place = converters(tmp_path, "target.touch(); sys.exit('unknown tokenizer')")
    done = fedit("export", finished, "--gguf", tmp_path / "out" / "m.gguf", "--llama-cpp", place)
    assert done.status == 1
    assert "unknown tokenizer" in done.stderr
    assert list((tmp_path / "out").iterdir()) == []
    (tmp_path / "precious").write_text("x")
    assert "exists" in fedit("export", finished, "--gguf", tmp_path / "precious", "--llama-cpp", place).stderr
    assert (tmp_path / "precious").read_text() == "x"


@pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="llama.cpp is no Python package: LLAMA_CPP names its folder")
def test_llama_cpps_own_converter(fedit, recipe, tmp_path, shared, monkeypatch) -> None:
    """The file has the merged model's tensors, the chat template, and what the card says."""
    monkeypatch.syspath_prepend(Path(os.environ["LLAMA_CPP"]) / "gguf-py")
    read = importlib.import_module("gguf").GGUFReader

    run, options = tmp_path / "run", ["-o", f"model.path={shared / 'models' / 'stories260K'}"]
    assert fedit("run", recipe, "--out", run, *NO_ANSWERS, *options, "-o", "evaluation.baselines=false").status == 0
    files = [tmp_path / "m.gguf", tmp_path / "a.gguf"]
    done = fedit("export", run, "--merged", tmp_path / "merged", "--gguf", files[0], "--gguf-adapter", files[1])
    assert done.status == 0, done.stderr
    whole, lora = map(read, files)
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in whole.tensors}
    for ours, theirs in (("mlp.down_proj", "ffn_down"), ("self_attn.o_proj", "attn_output")):
        expected = merged[f"model.layers.0.{ours}.weight"].half().float()
        torch.testing.assert_close(found[f"blk.0.{theirs}.weight"].float(), expected)
    field = whole.get_field("tokenizer.chat_template")
    assert field is not None
    assert field.contents() == (tmp_path / "merged" / "chat_template.jinja").read_text()
    adapter = load_file(run / "adapter" / "adapter_model.safetensors")
    down = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in lora.tensors}
    expected = adapter["base_model.model.model.layers.0.mlp.down_proj.lora_A.weight"]
    torch.testing.assert_close(down["blk.0.ffn_down.weight.lora_a"], expected)


# ---------------------------------------------------------------------------------------------------------- the Hub


def push(finished: Path, endpoint: str, token: str, *options: str | Path) -> subprocess.CompletedProcess[str]:
    """Run ``fedit export`` as a process: where the Hub is, its client asks once, when it is imported."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": token, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-m", "fedit.cli", "export", str(finished), *map(str, options)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.mark.slow
def test_pushing_to_the_hub(finished, tmp_path) -> None:
    """Private unless it is said otherwise; one repository holds one model; the card goes along."""
    with hub_server("hf_secret") as hub:
        done = push(finished, hub.endpoint, "hf_secret", "--push-to-hub", "lab/model")
        assert done.returncode == 0, done.stderr
        assert hub.repositories == {"lab/model": True}
        uploaded = hub.files["lab/model"]
        assert (
            uploaded["adapter_model.safetensors"] == (finished / "adapter" / "adapter_model.safetensors").read_bytes()
        )
        assert str(tmp_path).encode() not in b"".join(uploaded.values())
        assert f"Uploaded, private: {hub.endpoint}/lab/model" in done.stderr

        merged = tmp_path / "merged"
        done = push(finished, hub.endpoint, "hf_secret", "--merged", merged, "--push-to-hub", "lab/model")
        assert done.returncode == 0, done.stderr
        assert set(hub.files["lab/model"]) == {file.name for file in merged.iterdir()}

        done = push(finished, hub.endpoint, "hf_secret", "--push-to-hub", "lab/model", "--public")
        assert done.returncode == 1
        assert "it is there already, and private" in done.stderr

        hub.repositories["lab/model"] = False
        done = push(finished, hub.endpoint, "hf_secret", "--push-to-hub", "lab/model")
        assert done.returncode == 1
        assert "it is public already" in done.stderr
        assert "adapter_config.json" not in hub.files["lab/model"]

        done = push(finished, hub.endpoint, "hf_wrong", "--push-to-hub", "lab/other", "--public")
        assert done.returncode == 1
        assert "401" in done.stderr
        assert "hf_wrong" not in done.stderr
