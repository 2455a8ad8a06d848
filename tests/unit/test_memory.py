"""Slots and tokens are chosen so that they fit the memory and fill the batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from fedit import memory
from fedit.base import load_base, load_tokenizer
from fedit.bench import Workload, make_clients
from fedit.config import AdapterConfig, ClientConfig, EngineConfig, ModelConfig
from fedit.interfaces import EncodedExample, EngineError
from fedit.memory import fit_memory, memory_bytes, token_bytes
from fedit.model import StackedModel

CLIENT = ClientConfig(local_epochs=1, batch_size=4)


@pytest.fixture
def model(tiny_model_folder: Path) -> StackedModel:
    base = load_base(ModelConfig(path=str(tiny_model_folder), dtype="float32"), torch.device("cpu"))
    return StackedModel(base, load_tokenizer(str(tiny_model_folder)), AdapterConfig(rank=4, alpha=8))


def cohort(clients: int, length: int, rows: int = 10) -> list[list[EncodedExample]]:
    return make_clients(Workload(clients=clients, rows=rows, length=length, max_length=256), 200)


def engine(**values: object) -> EngineConfig:
    return EngineConfig.model_validate(values)


def test_slots_fill_the_batches_and_no_more(model: StackedModel) -> None:
    """Many tiny clients and few large ones keep every batch full."""
    for clients, length in ((1000, 12), (1000, 100), (10, 100), (3, 12)):
        rows = cohort(clients, length)
        fit_memory(model, engine(), CLIENT, rows)
        tokens = [len(row) for client in rows for row in client]
        step = sum(tokens) / (3 * clients) * model.max_slots  # three batches of 10 rows
        assert model.batch_tokens == 4096
        assert not model.checkpointing
        assert step >= 4096 or model.max_slots == clients
        assert model.max_slots == clients or step < 3 * 4096


def test_memory_bounds_slots_and_tokens(model: StackedModel) -> None:
    rows = cohort(1000, 12)
    base = sum(parameter.numel() * 4 for parameter in model.base.parameters() if not parameter.requires_grad)
    fit_memory(model, engine(), CLIENT, rows)
    unbounded, per_token = model.max_slots, token_bytes(model, 100)
    budget = base + 40 * model.slot_bytes
    fit_memory(model, engine(memory_gb=budget / 1e9), CLIENT, rows)
    assert 10 <= model.max_slots <= 20 < unbounded
    assert model.batch_tokens < 4096
    assert model.max_slots * model.slot_bytes + model.batch_tokens * per_token <= 40 * model.slot_bytes


def test_what_does_not_fit_is_recomputed(model: StackedModel) -> None:
    rows = cohort(3, 100)
    longest = max(len(row) for client in rows for row in client)
    kept = token_bytes(model, longest)
    model.checkpointing = True
    recomputed = token_bytes(model, longest)
    model.checkpointing = False
    assert recomputed < 0.8 * kept
    base = sum(tensor.numel() * 4 for tensor in (*model.base.parameters(), *model.base.buffers()))
    between = base + 3 * model.slot_bytes + 1.5 * longest * (kept + recomputed) / 2
    fit_memory(model, engine(memory_gb=between / 1e9, slots=3), CLIENT, rows)
    assert model.checkpointing
    assert longest <= model.batch_tokens < 4096
    fit_memory(model, engine(slots=3), CLIENT, rows)
    assert not model.checkpointing
    with pytest.raises(EngineError, match=r"tokens. Choose fewer \[engine\] slots"):
        fit_memory(model, engine(memory_gb=between / 1e9, slots=3, gradient_checkpointing=False), CLIENT, rows)


def test_slots_that_do_not_fit_are_refused(model: StackedModel) -> None:
    with pytest.raises(EngineError, match=r"100 slots of 0\.\d+ GB and a row of \d+ tokens: \d+ slots would fit"):
        fit_memory(model, engine(memory_gb=0.003, slots=100), CLIENT, cohort(200, 12))


def test_memory_is_the_smaller_of_machine_and_container(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu, limit = torch.device("cpu"), tmp_path / "memory.max"
    monkeypatch.setattr(memory, "CGROUP_LIMIT", limit)
    machine = memory_bytes(engine(), cpu)
    limit.write_text("max\n")
    assert memory_bytes(engine(), cpu) == machine
    limit.write_text("1000000\n")
    assert memory_bytes(engine(), cpu) == 500000
    assert memory_bytes(engine(memory_gb=2), cpu) == 2e9
    with pytest.raises(ValidationError):
        engine(memory_gb=0)
