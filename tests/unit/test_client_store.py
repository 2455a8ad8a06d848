"""What clients keep between rounds: found again by the right client, as of the right round, after any kill."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedit.engines.client_store import ClientStore
from fedit.interfaces import EngineError


def write(store: ClientStore, client: str, round_index: int, value: float) -> None:
    store.write(client, round_index, {"b": torch.tensor([value]), "a": torch.tensor(round_index)})


def read(store: ClientStore, client: str, round_index: int) -> float | None:
    kept = store.read(client, round_index)
    return kept["b"].item() if kept else None


def test_a_client_finds_its_own_and_nobody_else_s(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    names = ["a", "b", "../a", "a/b", "..", "A b\u00e9"]
    for value, name in enumerate(names):
        write(store, name, 0, value)
    assert [read(ClientStore(tmp_path), name, 1) for name in names] == list(range(len(names)))
    assert read(store, "c", 1) is None
    assert sorted(path.parent.parent for path in tmp_path.rglob("*.safetensors")) == [tmp_path] * len(names)


def test_a_round_that_is_run_again_finds_what_was_kept_before_it(tmp_path: Path) -> None:
    """Killed between the client's answer and the checkpoint, in whatever round it took part before."""
    store = ClientStore(tmp_path)
    for round_index in (2, 5, 6):
        write(store, "a", round_index, round_index)
    assert read(store, "a", 6) == 5
    assert read(store, "a", 9) == 6
    write(store, "a", 6, 66)
    assert (read(store, "a", 5), read(store, "a", 6), read(store, "a", 7)) == (2, 5, 66)


def test_three_rounds_are_kept_and_none_of_a_run_that_was_set_back(tmp_path: Path) -> None:
    store = ClientStore(tmp_path)
    for round_index, kept in (
        (0, [0]),
        (100_000, [0, 100_000]),
        (3, [0, 3]),
        (4, [0, 3, 4]),
        (9, [3, 4, 9]),
        (9, [3, 4, 9]),
        (12, [4, 9, 12]),
    ):
        write(store, "a", round_index, round_index)
        assert sorted(path.name for path in tmp_path.rglob("*.*")) == [f"round-{i:05d}.safetensors" for i in kept]


def test_what_another_configuration_kept_is_refused(tmp_path: Path) -> None:
    write(ClientStore(tmp_path, "one"), "a", 0, 1.0)
    with pytest.raises(EngineError, match=r"kept by a run of another configuration \(one, this one is two\)"):
        ClientStore(tmp_path, "two").read("a", 1)
    assert read(ClientStore(tmp_path, "one"), "a", 1) == 1.0


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    write(ClientStore(tmp_path), "a", 0, 1.0)
    file = next(tmp_path.rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(EngineError, match="is damaged"):
        ClientStore(tmp_path).read("a", 1)
