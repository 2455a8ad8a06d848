"""Stacked tuning equals plain PEFT + torch AdamW, client by client."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedit.config import AdapterConfig, ClientConfig, ModelConfig
from fedit.interfaces import Adapter, EncodedExample, Example, Turn, derive_rng
from fedit.model import Batch, StackedModel, load_base, load_tokenizer
from fedit.tuning import TuningTask, batch_indices, group_by_length, tune

CPU = torch.device("cpu")


def make_examples(seed: int, count: int, vocabulary: int = 200) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        prompt, response = rng.integers(3, 20), rng.integers(1, 12)
        ids = rng.integers(3, vocabulary, prompt + response).astype(np.int32)
        supervised = np.arange(prompt + response) >= prompt
        examples.append(EncodedExample(ids, supervised, Example((Turn("", ""),))))
    return examples


def load(folder: Path, adapter: AdapterConfig, dtype: torch.dtype = torch.float32) -> StackedModel:
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), CPU).to(dtype)
    return StackedModel(base, load_tokenizer(str(folder)), adapter)


def random_adapter(model: StackedModel, seed: int, rank: int) -> Adapter:
    rng = np.random.default_rng(seed)
    full = model.fresh_adapter(rng)
    tensors = {
        name: (tensor[:rank] if "lora_A" in name else torch.from_numpy(rng.normal(0, 0.02, (len(tensor), rank))).float())
        for name, tensor in full.tensors.items()
    }
    return Adapter(tensors, rank, model.lora_alpha)


def tune_with_peft(
    folder: Path, task: TuningTask, config: ClientConfig, dtype: torch.dtype = torch.float32
) -> Mapping[str, Tensor]:
    """The reference: one client, one PEFT model, torch's AdamW, one padded batch with a mask, whole-sequence logits."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    lora = LoraConfig(
        r=task.adapter.rank, lora_alpha=task.adapter.lora_alpha, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora).to(dtype)
    trained = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == task.adapter.tensors.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(task.adapter.tensors[name])
    optimizer = torch.optim.AdamW(trained.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    for step in range(task.first_step, task.first_step + task.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - step / task.total_steps)
        rows = [task.examples[i] for i in batch_indices(len(task.examples), config.batch_size, step, task.seed)]
        length = max(len(row) for row in rows)
        input_ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
        labels = torch.full((len(rows), length), -100)
        for i, row in enumerate(rows):
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            input_ids[i, : len(row)], mask[i, : len(row)] = ids, 1
            labels[i, : len(row)] = torch.where(torch.from_numpy(row.supervised), ids, torch.tensor(-100))
        optimizer.zero_grad()
        model(input_ids=input_ids, attention_mask=mask, labels=labels).loss.backward()
        assert config.clip_norm is not None
        torch.nn.utils.clip_grad_norm_(trained.values(), config.clip_norm)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in trained.items()}


def make_task(model: StackedModel, seed: int, count: int, rank: int, num_steps: int, first_step: int = 0) -> TuningTask:
    adapter = random_adapter(model, seed, rank)
    return TuningTask(f"client{seed}", make_examples(seed, count), adapter, first_step, num_steps, 20, seed)


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """|got - expected| / |expected - start|, over all tensors: the error of the update, not of the weights."""
    error = sum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
    moved = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    return (error / moved) ** 0.5


CONFIG = ClientConfig(
    local_steps=6, batch_size=4, learning_rate=5e-4, schedule="linear", weight_decay=0.01, clip_norm=0.5
)


@pytest.mark.parametrize("num_slots", [1, 2, 5])
def test_stacked_equals_peft_one_by_one(tiny_model_folder: Path, num_slots: int) -> None:
    """Ragged client sizes, mixed ranks, uneven steps and starts, slots refilled: each client as if it were alone."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    tasks = [
        make_task(model, seed=1, count=9, rank=4, num_steps=6),
        make_task(model, seed=2, count=3, rank=6, num_steps=7),
        make_task(model, seed=3, count=17, rank=2, num_steps=5, first_step=3),
        make_task(model, seed=4, count=1, rank=6, num_steps=9),
        make_task(model, seed=5, count=6, rank=4, num_steps=5),
    ]
    results = {result.task.name: result for result in tune(model, tasks, CONFIG, num_slots)}
    assert results.keys() == {task.name for task in tasks}
    for task in tasks:
        expected = tune_with_peft(tiny_model_folder, task, CONFIG)
        got = results[task.name].adapter
        assert got.rank == task.adapter.rank
        print(relative_error(got.tensors, expected, task.adapter.tensors))
        assert relative_error(got.tensors, expected, task.adapter.tensors) < 1e-5
