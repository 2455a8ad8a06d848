"""Local objectives in the stack equal plain PEFT and torch with the objective written out, client by client."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftModel
from plain_tuning import load, make_examples, mean_loss, random_adapter, relative_error, tune_with_peft
from torch import Tensor, nn

from fedit.config import AdapterConfig, ClientConfig
from fedit.evaluation.heldout import preference_accuracy, with_reference_margins
from fedit.interfaces import EncodedExample
from fedit.model import StackedModel
from fedit.objectives import DPO, SelfPruning
from fedit.tuning import TuningTask, tune

SHAPE = AdapterConfig(rank=4, alpha=8)
ADAMW = ClientConfig(local_steps=5, batch_size=3, learning_rate=1e-3, schedule="linear", clip_norm=0.5)
SGD = ADAMW.model_copy(update={"optimizer": "sgd", "learning_rate": 0.5, "clip_norm": None, "weight_decay": 0.01})
Trained = Mapping[str, nn.Parameter]
Rows = Sequence[EncodedExample]


def tasks(model: StackedModel, counts: Sequence[int] = (7, 3, 5)) -> list[TuningTask]:
    return [
        TuningTask(str(seed), make_examples(seed, count), random_adapter(model, seed, 4 - seed % 2), 0, 5, 20, seed)
        for seed, count in enumerate(counts)
    ]


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_sgd(tiny_model_folder: Path, num_slots: int) -> None:
    model = load(tiny_model_folder, SHAPE, torch.float64)
    for result in tune(model, tasks(model), SGD, num_slots):
        expected = tune_with_peft(tiny_model_folder, result.task, SGD, torch.float64)
        assert relative_error(result.adapter.tensors, expected, result.task.adapter.tensors) < 1e-5
        assert result.rate_sum == pytest.approx(sum(0.5 * (1 - step / 20) for step in range(5)))


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
def test_a_pull_is_a_quadratic_term_of_the_loss(tiny_model_folder: Path, config: ClientConfig) -> None:
    """FedProx and Ditto; one client in the middle is not pulled, and a slot that was pulled is used again."""
    model = load(tiny_model_folder, SHAPE, torch.float64)
    pulled = [
        replace(task, anchor=random_adapter(model, 50 + k, task.adapter.rank).tensors, pull=0.3 * k)
        for k, task in enumerate(tasks(model, (7, 3, 5, 4)))
    ]
    pulled[1] = replace(pulled[1], anchor=None, pull=0.0)
    for result in tune(model, pulled, config, 2):
        task = result.task

        def loss(peft: PeftModel, rows: Rows, trained: Trained, task: TuningTask = task) -> Tensor:
            anchor = task.anchor or {}
            squares = [(parameter - anchor[name]).square().sum() for name, parameter in trained.items() if anchor]
            return mean_loss(peft, rows) + task.pull / 2 * sum(squares, torch.zeros(()))

        expected = tune_with_peft(tiny_model_folder, task, config, torch.float64, loss_of=loss)
        assert relative_error(result.adapter.tensors, expected, task.adapter.tensors) < 1e-5


def test_a_correction_is_a_linear_term_of_the_loss(tiny_model_folder: Path) -> None:
    """SCAFFOLD's c - c_k, under SGD."""
    model = load(tiny_model_folder, SHAPE, torch.float64)
    corrected = [
        replace(task, correction=random_adapter(model, 70 + k, task.adapter.rank).tensors if k != 1 else None)
        for k, task in enumerate(tasks(model))
    ]
    for result in tune(model, corrected, SGD, 1):
        task = result.task

        def loss(peft: PeftModel, rows: Rows, trained: Trained, task: TuningTask = task) -> Tensor:
            terms = [(trained[name] * tensor).sum() for name, tensor in (task.correction or {}).items()]
            return mean_loss(peft, rows) + sum(terms, torch.zeros(()))

        expected = tune_with_peft(tiny_model_folder, task, SGD, torch.float64, loss_of=loss)
        assert relative_error(result.adapter.tensors, expected, task.adapter.tensors) < 1e-5


@pytest.mark.parametrize("config", [ADAMW, SGD], ids=["adamw", "sgd"])
@pytest.mark.parametrize("num_slots", [1, 3])
def test_shrinkage_is_a_product_of_norms_in_the_loss(
    tiny_model_folder: Path, config: ClientConfig, num_slots: int
) -> None:
    """Of the last components of each client, whatever its rank."""
    model = load(tiny_model_folder, SHAPE, torch.float64)
    objective = SelfPruning(strength=0.05, keep=0.5)
    for result in tune(model, tasks(model), config, num_slots, objective=objective):
        kept_rank = {4: 2, 3: 1}[result.task.adapter.rank]

        def loss(peft: PeftModel, rows: Rows, trained: Trained, kept_rank: int = kept_rank) -> Tensor:
            norms = [
                trained[name][kept_rank:].norm() * trained[name.replace("lora_A", "lora_B")][:, kept_rank:].norm()
                for name in trained
                if "lora_A" in name
            ]
            return mean_loss(peft, rows) + 0.05 * sum(norms, torch.zeros(()))

        expected = tune_with_peft(tiny_model_folder, result.task, config, torch.float64, loss_of=loss)
        assert relative_error(result.adapter.tensors, expected, result.task.adapter.tensors) < 1e-5


def test_shrinkage_of_an_untrained_adapter_is_no_division_by_zero(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, SHAPE)
    task = TuningTask("a", make_examples(0, 6), model.fresh_adapter(np.random.default_rng(0)), 0, 3, 3, 0)
    (result,) = tune(model, [task], ADAMW, 1, objective=SelfPruning(strength=1000.0))
    assert result.failure is None
    assert all(bool(tensor.isfinite().all()) for tensor in result.adapter.tensors.values())


def pairs(seed: int, count: int) -> list[EncodedExample]:
    """Rows with a rejected response of another length."""
    made = []
    for row in make_examples(seed, count):
        draw = np.random.default_rng(len(row))
        ids = np.concatenate([row.prompt_ids, draw.integers(3, 200, int(draw.integers(1, 9)))]).astype(np.int32)
        other = EncodedExample(ids, np.arange(len(ids)) >= len(row.prompt_ids), row.example)
        made.append(replace(row, rejected=other))
    return made


def log_likelihood(model: nn.Module, row: EncodedExample) -> Tensor:
    ids = torch.from_numpy(row.input_ids.astype(np.int64))[None]
    logits = model(input_ids=ids).logits[0, :-1].log_softmax(dim=-1)
    return logits.gather(1, ids[0, 1:, None])[torch.from_numpy(row.supervised[1:]), 0].sum()


def dpo_loss(peft: PeftModel, rows: Rows, _: object, beta: float = 0.3) -> Tensor:
    losses = []
    for row in rows:
        assert row.rejected is not None
        margin = log_likelihood(peft, row) - log_likelihood(peft, row.rejected)
        with torch.no_grad(), peft.disable_adapter():
            reference = log_likelihood(peft, row) - log_likelihood(peft, row.rejected)
        losses.append(-torch.nn.functional.logsigmoid(beta * (margin - reference)))
    return torch.stack(losses).mean()


@pytest.mark.parametrize(("num_slots", "batch_tokens"), [(1, 4096), (3, 4096), (3, 40)])
def test_dpo(tiny_model_folder: Path, num_slots: int, batch_tokens: int) -> None:
    """The reference is the base without its adapter, whatever the pairs share a pass with, and if passes part them."""
    model = load(tiny_model_folder, SHAPE, torch.float64)
    model.batch_tokens = batch_tokens
    given = [replace(task, examples=with_reference_margins(model, pairs(k, 7))) for k, task in enumerate(tasks(model))]
    for result in tune(model, given, ADAMW, num_slots, objective=DPO(beta=0.3)):
        expected = tune_with_peft(tiny_model_folder, result.task, ADAMW, torch.float64, loss_of=dpo_loss)
        assert relative_error(result.adapter.tensors, expected, result.task.adapter.tensors) < 1e-5
        trained_on = sum(row.num_trained for row in result.task.examples)
        assert trained_on < result.num_tokens < 3 * trained_on


def test_dpo_prefers_in_the_end_what_was_chosen(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, SHAPE)
    rows = with_reference_margins(model, pairs(0, 12))
    start = model.fresh_adapter(np.random.default_rng(0))
    task = TuningTask("a", rows, start, 0, 40, 40, 0)
    (result,) = tune(model, [task], ADAMW.model_copy(update={"learning_rate": 1e-2}), 1, objective=DPO())
    accuracy = preference_accuracy(model, {"base": None, "untrained": start, "tuned": result.adapter}, rows)
    assert accuracy == {"base": 0.5, "untrained": 0.5, "tuned": 1.0}
