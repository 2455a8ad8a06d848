"""`fedit bench`: what is counted."""

from __future__ import annotations

import json

import pytest
import torch

from fedit import bench
from fedit.cli import main
from fedit.config import AdapterConfig
from fedit.interfaces import ConfigError
from fedit.model import StackedModel


def test_made_up_rows_are_reproducible_and_spread() -> None:
    workload = bench.Workload(clients=3, rows=200, length=80, max_length=300)
    clients = bench.make_clients(workload, 500)
    again = bench.make_clients(workload, 500)
    assert [[row.input_ids.tolist() for row in rows] for rows in clients] == [
        [row.input_ids.tolist() for row in rows] for rows in again
    ]
    lengths = sorted(len(row) for rows in clients for row in rows)
    assert 70 < lengths[300] < 90
    assert lengths[0] >= 8
    assert lengths[-1] == 300
    assert all(not row.supervised[0] and row.supervised[-1] for rows in clients for row in rows)


def test_flops_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One layer: q 16x16, k and v 16x8, o 16x16, gate, up and down 16x24; head 16x40; rank 2."""
    shape = {"hidden": 16, "intermediate": 24, "layers": 1, "heads": 2, "groups": 1, "vocabulary": 40}
    monkeypatch.setitem(bench.SHAPES, "dot", shape)
    base = bench.load_shape("dot", "float32", torch.device("cpu"))

    class Tokenizer:
        eos_token_id = 1

    model = StackedModel(base, Tokenizer(), AdapterConfig(rank=2))  # pyright: ignore[reportArgumentType]
    rows = bench.make_clients(bench.Workload(clients=1, rows=2, length=15), 40)[0]
    lengths = [len(row) for row in rows]
    weights, adapter = 2 * 256 + 2 * 128 + 3 * 384, 2 * (2 * 32 + 2 * 24 + 3 * 40)
    expected = (
        (4 * weights + 6 * adapter) * sum(lengths)
        + 4 * 640 * sum(row.num_supervised for row in rows)
        + 6 * 16 * sum(length**2 for length in lengths)
    )
    assert bench.model_flops(model, [rows]) == expected


def test_the_command(tiny_model_folder, capsys: pytest.CaptureFixture[str]) -> None:
    options = "--clients 3 --rows 4 --length 12 --repetitions 1 --slots 2 --dtype float32 --device cpu".split()
    with pytest.raises(SystemExit, match="0"):
        main(["bench", str(tiny_model_folder), *options, "--json"])
    measured = json.loads(capsys.readouterr().out)
    assert measured["slots"] == 2
    assert measured["tokens"] > 0
    assert 0 <= measured["padding_fraction"] < 1
    assert measured["model_flops_utilisation"] > 0
    with pytest.raises(SystemExit, match="0"):
        main(["bench", str(tiny_model_folder), *options])
    assert "Utilisation" in capsys.readouterr().out


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ConfigError, match="Did you mean 'llama-7b'"):
        bench.load_shape("llama-7", "float32", torch.device("cpu"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--rank 0", "rank = 0: expected at least 1"),
        ("--clients 0", "clients = 0"),
        ("--max-length 4", "max_length = 4: expected at least 8"),
        ("--repetitions 0", "repetitions = 0"),
        ("--slots 0", "slots = 0"),
        ("--max-length 100000", "is more than the"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny_model_folder, capsys, options: str, message: str) -> None:
    with pytest.raises(SystemExit, match="1"):
        main(["bench", str(tiny_model_folder), *options.split()])
    assert message in capsys.readouterr().err
