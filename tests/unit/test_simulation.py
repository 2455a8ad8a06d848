"""The simulation engine: which part of a client's training a round is."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from fedit.config import RunConfig, load_plugins
from fedit.engines import simulation
from fedit.engines.client_store import ClientStore
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, EncodedExample, Example, Turn
from fedit.optimizer import Moments
from fedit.tuning import TuningResult, TuningTask

ADAPTER = Adapter({"q.lora_A.weight": torch.ones(1, 2), "q.lora_B.weight": torch.zeros(3, 1)}, 1, 2.0)
ROW = EncodedExample(np.array([3, 4], dtype=np.int32), np.array([False, True]), Example((Turn("a", "b"),)))


@pytest.fixture
def tuned(monkeypatch: pytest.MonkeyPatch) -> list[TuningTask]:
    """Replaces the tuner by one that moves every tensor by 0.5 and fails for client c; returns the tasks it got."""
    seen: list[TuningTask] = []

    def tune(model: Any, tasks: Iterable[TuningTask], *_: Any, keep_moments: bool) -> Iterator[TuningResult]:
        for task in reversed(list(tasks)):
            seen.append(task)
            moved = {name: tensor + 0.5 for name, tensor in task.adapter.tensors.items()}
            failure = "broken" if task.name == "c" else None
            before = task.moments or Moments(torch.zeros(1), torch.zeros(1), 0)
            moments = Moments(before.first + 1, before.second + 2, before.num_steps + task.num_steps)
            kept = moments if keep_moments else None
            yield TuningResult(task, task.adapter.with_tensors(moved), 1.5, 40, kept, 0.01, failure)

    monkeypatch.setattr(simulation, "tune", tune)
    return seen


@pytest.fixture
def store(tmp_path: Path) -> ClientStore:
    return ClientStore(tmp_path)


def run(store: ClientStore, client: dict[str, Any], round_index: int, seed: int = 0, num_earlier: int = 0) -> list[Any]:
    load_plugins()
    config = RunConfig.model_validate({"seed": seed, "rounds": 7, "client": client})
    clients = {"a": [ROW] * 10, "b": [ROW] * 3, "c": [ROW]}
    engine = simulation.Simulation(config, SimpleNamespace(max_slots=16), clients, store)  # pyright: ignore[reportArgumentType]
    assert engine.clients() == {"a": 10, "b": 3, "c": 1}
    return list(engine.run([ClientTask(name, round_index, ADAPTER, num_earlier) for name in engine.clients()]))


def test_a_round_is_the_next_part_of_the_training(tuned: list[TuningTask], store: ClientStore) -> None:
    run(store, {"local_steps": 5, "batch_size": 4}, round_index=3)
    assert {(task.first_step, task.num_steps, task.total_steps) for task in tuned} == {(15, 5, 35)}


def test_a_client_goes_on_where_its_own_last_round_stopped(tuned: list[TuningTask], store: ClientStore) -> None:
    """The rates follow the rounds of the run, the rows those that sampled the client."""
    run(store, {"local_steps": 5, "batch_size": 4}, round_index=3, num_earlier=2)
    assert {(task.first_step, task.first_batch) for task in tuned} == {(15, 10)}


def test_epochs_are_steps_of_the_client_s_own_size(tuned: list[TuningTask], store: ClientStore) -> None:
    run(store, {"local_epochs": 2, "batch_size": 4}, round_index=3)
    parts = {task.name: (task.first_step, task.num_steps, task.total_steps) for task in tuned}
    assert parts == {"a": (18, 6, 42), "b": (6, 2, 14), "c": (6, 2, 14)}


def test_who_has_most_steps_begins_first(tuned: list[TuningTask], store: ClientStore) -> None:
    load_plugins()
    config = RunConfig.model_validate({"client": {"local_epochs": 1, "batch_size": 1}})
    clients = {"few": [ROW], "many": [ROW] * 9, "some": [ROW] * 3, "also few": [ROW]}
    engine = simulation.Simulation(config, SimpleNamespace(max_slots=16), clients, store)  # pyright: ignore[reportArgumentType]
    list(engine.run([ClientTask(name, 0, ADAPTER, 0) for name in clients]))
    # The stand-in for the tuner takes the last task first.
    assert [task.name for task in reversed(tuned)] == ["many", "some", "few", "also few"]


def test_seeds_are_the_client_s_and_the_run_s(tuned: list[TuningTask], store: ClientStore) -> None:
    for round_index, seed in ((0, 0), (1, 0), (0, 1)):
        run(store, {"local_steps": 1}, round_index, seed)
    seeds = [{task.name: task.seed for task in tuned[start : start + 3]} for start in (0, 3, 6)]
    assert seeds[0] == seeds[1]
    assert len({*seeds[0].values(), *seeds[2].values()}) == 6


def test_answers_are_updates_or_failures(tuned: list[TuningTask], store: ClientStore) -> None:
    answers = {answer.client: answer for answer in run(store, {"local_steps": 1}, 0)}
    assert answers["c"] == ClientFailure("c", "broken")
    update = answers["a"]
    assert isinstance(update, ClientUpdate)
    assert (update.num_examples, update.num_tokens, update.loss) == (10, 40, 1.5)
    assert all(torch.equal(tensor, torch.full_like(tensor, 0.5)) for tensor in update.update.tensors.values())


def test_moments_are_each_client_s_own_and_forgotten_unless_kept(tuned: list[TuningTask], store: ClientStore) -> None:
    for round_index in (0, 1):
        run(store, {"local_steps": 3}, round_index)
    assert [task.moments for task in tuned] == [None] * 6
    tuned.clear()
    for round_index in (0, 1, 4):
        run(store, {"local_epochs": 1, "batch_size": 4, "moments": "keep"}, round_index)
    received = [(task.name, task.moments.num_steps if task.moments else None) for task in tuned]
    first, second, third = received[:3], received[3:6], received[6:]
    assert first == [("c", None), ("b", None), ("a", None)]
    assert second == [("c", None), ("b", 1), ("a", 3)]
    assert third == [("c", None), ("b", 2), ("a", 6)]
    assert tuned[-1].moments is not None
    assert (tuned[-1].moments.first.item(), tuned[-1].moments.second.item()) == (2, 4)
