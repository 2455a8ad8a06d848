"""A run that was killed and resumed gives the bits of one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forked_runs import KILLS, ForkedRuns

from fedit.report import RunFolder

RESULTS = (
    "adapter/adapter_config.json",
    "adapter/adapter_model.safetensors",
    "answers.jsonl",
    "checkpoints/round-00004.safetensors",
    "evaluation.json",
    "partition.json",
    "rounds.jsonl",
)
"""What depends on the configuration alone, to the byte."""

PLUGIN = """
import os, time
from pathlib import Path
from fedit.aggregation import FedIT


class Patient(FedIT):
    '''FedIT that waits, from the second round on, as long as the file that HOLD names is there.'''

    name = "patient"

    def aggregate(self, adapter, updates, rng):
        result = super().aggregate(adapter, updates, rng)
        first_round = all(not tensor.any() for name, tensor in adapter.tensors.items() if "lora_B" in name)
        while not first_round and Path(os.environ.get("HOLD", "none")).exists():
            time.sleep(0.01)
        return result
"""

RECIPE = """
rounds = 4
[model]
path = "{model}"
dtype = "float32"
[adapter]
rank = 2
alpha = 4
dropout = 0.1
[data]
path = "{data}"
test_per_category = 2
template = "plain"
[partition]
name = "iid"
num_clients = 4
[client]
local_steps = 2
batch_size = 3
learning_rate = 1e-2
schedule = "cosine"
moments = "keep"
[cohort]
size = 3
[aggregation]
name = "patient"
[server_optimizer]
name = "fedavgm"
momentum = 0.5
[evaluation]
every = 2
max_new_tokens = 3
[engine]
slots = 2
device = "cpu"
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    """A recipe, its data and its plug-in."""
    folder = tmp_path_factory.mktemp("resume")
    rows = [
        {"instruction": f"{word} {n}?", "response": word[::-1], "category": word}
        for word in ("ab", "cde")
        for n in range(9)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "patient.py").write_text(PLUGIN)
    (folder / "recipe.toml").write_text(RECIPE.format(model=tiny_model_folder, data=folder / "rows.jsonl"))
    return folder


@pytest.fixture(scope="module")
def fedit(folder: Path) -> Iterator[ForkedRuns]:
    with ForkedRuns(folder) as runs:
        yield runs


def start(folder: Path, out: Path, *options: str) -> list[str]:
    """Return the arguments of a new run."""
    return ["run", str(folder / "recipe.toml"), "--plugin", str(folder / "patient.py"), "--out", str(out), *options]


@pytest.fixture(scope="module")
def uninterrupted(folder: Path, fedit: ForkedRuns) -> Path:
    done = fedit(*start(folder, folder / "uninterrupted"))
    assert done.status == 0, done.output
    return folder / "uninterrupted"


def results(run: Path) -> dict[str, bytes]:
    return {name: (run / name).read_bytes() for name in RESULTS}


def assert_same_results(run: Path, expected: Path) -> None:
    got, wanted = results(run), results(expected)
    assert [name for name in RESULTS if got[name] != wanted[name]] == []
    # The report can be made and every timing line is whole, though their numbers differ.
    assert (run / "report.html").is_file()
    assert [line["round"] for line in RunFolder.read(run).rounds] == [1, 2, 3, 4]


# ------------------------------------------------------------------------------------------------------------- seeds


def test_the_same_seed_gives_the_same_bits(folder, fedit, uninterrupted, tmp_path) -> None:
    assert fedit(*start(folder, tmp_path / "again")).status == 0
    assert_same_results(tmp_path / "again", uninterrupted)


def test_another_seed_gives_other_bits(folder, fedit, uninterrupted, tmp_path) -> None:
    assert fedit(*start(folder, tmp_path / "other", "--seed", "1")).status == 0
    other, expected = results(tmp_path / "other"), results(uninterrupted)
    assert [name for name in RESULTS if other[name] == expected[name]] == ["adapter/adapter_config.json"]


# ----------------------------------------------------------------------------------------------------------- kill -9


@pytest.mark.parametrize("moment", [moment for moment in KILLS if moment != "config.json has its temporary name"])
def test_killed_and_resumed(folder, fedit, uninterrupted, tmp_path, moment: str) -> None:
    run = tmp_path / "run"
    assert fedit(*start(folder, run), kill=moment).status == -signal.SIGKILL
    assert not (run / "report.html").exists()
    resumed = fedit("run", "--resume", run)
    assert resumed.status == 0, resumed.output
    assert_same_results(run, uninterrupted)
    assert list(run.rglob(".*")) == []


def test_killed_again_and_again(folder, fedit, uninterrupted, tmp_path) -> None:
    run = tmp_path / "run"
    arguments = start(folder, run)
    for moment in (
        "between line and checkpoint",
        "with half a line of timings",
        "before the adapter",
        "in centralised tuning",
    ):
        fedit(*arguments, kill=moment)
        arguments = ["run", "--resume", str(run)]
    assert fedit(*arguments).status == 0
    assert_same_results(run, uninterrupted)


COMPRESSED = ("upload.mask=top-k", "upload.density=0.1", "upload.quantizer=int8", "download.quantizer=int4")
"""Errors to make up for, at the clients and at the server"""


@pytest.mark.parametrize(
    ("rule", "more"),
    [
        ("fedsa-lora", ()),
        ("flora", ()),
        ("fedex-lora", ()),
        ("rolora", COMPRESSED),
        ("lora-a2", ()),
        ("fedit-plus", ()),
        ("fedit", COMPRESSED),
        ("tinylora", ()),
        ("fedkseed", ("client.optimizer=sgd",)),
    ],
)
def test_rules_that_keep_more_than_an_adapter(folder, fedit, tmp_path, rule: str, more: tuple[str, ...]) -> None:
    """Clients' own factors, what lies beside the adapter, errors to make up for: killed twice, and the same bytes."""
    chosen = ["aggregation.name=" + rule, "server_optimizer.name=fedavg", "client.moments=reset", *more]
    options = [part for option in (*chosen, "evaluation.baselines=false") for part in ("-o", option)]
    assert fedit(*start(folder, tmp_path / "whole", *options)).status == 0
    run = tmp_path / "run"
    assert fedit(*start(folder, run, *options), kill="between line and checkpoint").status == -signal.SIGKILL
    assert fedit("run", "--resume", run, kill="before the adapter").status == -signal.SIGKILL
    resumed = fedit("run", "--resume", run)
    assert resumed.status == 0, resumed.output

    def written(folder: Path) -> dict[str, bytes]:
        files = [*folder.rglob("*.safetensors"), *folder.glob("*.jsonl"), folder / "evaluation.json"]
        return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.name != "timings.jsonl"}

    got, expected = written(run), written(tmp_path / "whole")
    assert [name for name in expected if got.get(name) != expected[name]] == []


def test_killed_before_there_is_a_run(folder, fedit, uninterrupted, tmp_path) -> None:
    """Nothing is there to resume: the message says so, and the same command starts again."""
    run = tmp_path / "run"
    assert fedit(*start(folder, run), kill="config.json has its temporary name").status == -signal.SIGKILL
    resumed = fedit("run", "--resume", run)
    assert resumed.status == 1
    assert "is not a run" in resumed.output
    assert fedit(*start(folder, run)).status == 0
    assert_same_results(run, uninterrupted)


def test_a_finished_run_stays_as_it_is(fedit, uninterrupted, tmp_path) -> None:
    run = tmp_path / "run"
    shutil.copytree(uninterrupted, run)
    assert fedit("run", "--resume", run).status == 0
    assert_same_results(run, uninterrupted)


# ----------------------------------------------------------------------------------------------- signals from outside


COMMAND = """
import signal, sys
from fedit.cli import main
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has its background jobs ignore it
main(sys.argv[1:])
"""


@pytest.fixture
def held(folder: Path, tmp_path: Path) -> Iterator[dict[Path, subprocess.Popen[str]]]:
    """Two runs as commands of their own, in their second round until they are stopped."""
    hold = tmp_path / "hold"
    hold.touch()
    environment = {**os.environ, "HOLD": str(hold), "COLUMNS": "40"}
    processes = {}
    for run in (tmp_path / "killed", tmp_path / "an interrupted [1]"):
        command = [sys.executable, "-c", COMMAND, *start(folder, run)]
        processes[run] = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    try:
        deadline = time.monotonic() + 300
        for run, process in processes.items():
            while not (run / "checkpoints" / "round-00001.safetensors").exists():
                assert process.poll() is None, process.communicate()[0]
                assert time.monotonic() < deadline
                time.sleep(0.02)
        yield processes
    finally:
        for process in processes.values():
            process.kill()


def test_stopped_from_outside_in_the_second_round(fedit, uninterrupted, held) -> None:
    outputs = {}
    for (run, process), number in zip(held.items(), (signal.SIGKILL, signal.SIGINT), strict=True):
        process.send_signal(number)
        outputs[run], _ = process.communicate(timeout=120)
        assert len((run / "rounds.jsonl").read_text().splitlines()) == 1
    killed, interrupted = held
    assert held[killed].returncode == -signal.SIGKILL
    assert held[interrupted].returncode == 130
    assert f"fedit run --resume '{interrupted}'\n" in outputs[interrupted]
    assert "Traceback" not in outputs[interrupted]
    for run in held:
        resumed = fedit("run", "--resume", run)
        assert resumed.status == 0, resumed.output
        assert_same_results(run, uninterrupted)


# ----------------------------------------------------------------------------------------------------- what is refused


@pytest.fixture
def killed(folder: Path, fedit: ForkedRuns, tmp_path: Path) -> Path:
    assert fedit(*start(folder, tmp_path / "run"), kill="in the second round").status == -signal.SIGKILL
    return tmp_path / "run"


def contents(run: Path) -> dict[str, bytes]:
    return {str(file.relative_to(run)): file.read_bytes() for file in run.rglob("*") if file.is_file()}


def refusal_with(fedit: ForkedRuns, killed: Path, file: Path, altered: bytes) -> str:
    """Try to resume while `file` holds other bytes; nothing of the run may change. Return what was said."""
    content, before = file.read_bytes(), contents(killed)
    assert altered != content
    file.write_bytes(altered)
    try:
        refused = fedit("run", "--resume", killed)
    finally:
        file.write_bytes(content)
    assert refused.status == 1
    assert contents(killed) == before
    return refused.output


def test_resuming_on_other_rows_or_another_base_is_refused(
    folder, fedit, tiny_model_folder, uninterrupted, killed
) -> None:
    """Other rows, one other bit in the weights, another precision; with all as it was, the run ends as it should."""
    rows = folder / "rows.jsonl"
    message = refusal_with(fedit, killed, rows, rows.read_bytes().replace(b"ab 3?", b"ab 33?"))
    assert "DataError" in message
    assert "was started on other rows" in message

    weights = tiny_model_folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-3] ^= 1
    message = refusal_with(fedit, killed, weights, bytes(content))
    assert "EngineError" in message
    assert "was started on a base of other weights" in message

    described = killed / "config.json"
    started = json.loads(described.read_text())
    started["hardware"]["dtype"] = "bfloat16"
    message = refusal_with(fedit, killed, described, json.dumps(started).encode())
    assert "was started on a base of other precision" in message

    assert fedit("run", "--resume", killed).status == 0
    assert_same_results(killed, uninterrupted)


@pytest.mark.parametrize("option", [["-o", "rounds=9"], ["--seed", "3"], ["--out", "elsewhere"], ["dolly"]])
def test_resuming_with_another_configuration_is_refused(fedit, killed, option: list[str]) -> None:
    before = contents(killed)
    refused = fedit("run", "--resume", killed, *option)
    assert refused.status == 1
    assert "ConfigError" in refused.output
    assert "leave out the recipe, -o, --out and --seed" in refused.output
    assert contents(killed) == before


def test_starting_anew_in_the_folder_of_a_run_is_refused(folder, fedit, killed) -> None:
    before = contents(killed)
    refused = fedit(*start(folder, killed))
    assert refused.status == 1
    assert f"fedit run --resume {killed}" in refused.output
    assert contents(killed) == before
