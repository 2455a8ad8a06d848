"""Clients that tune by seeds, side by side, equal a plain loop over PEFT models, and nothing of them is a gradient."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from plain_tuning import load, make_examples, mean_loss
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedit.adapter import ALONG, AMOUNTS, SEEDS, Adapter
from fedit.aggregation import FedKSeed
from fedit.config import AdapterConfig, ClientConfig
from fedit.interfaces import EncodedExample, derive_rng, derive_seed
from fedit.model import StackedModel
from fedit.tuning import TuningTask, batch_indices, tune

CONFIG = ClientConfig(local_steps=6, batch_size=3, learning_rate=1e-2, optimizer="sgd", clip_norm=None)
EPSILON = 0.01


def started(model: StackedModel) -> Adapter:
    """An adapter that has gone some way along its directions."""
    fresh = model.fresh_adapter(np.random.default_rng(0))
    start = FedKSeed(seeds=9).initial(fresh, model.weight, np.random.default_rng(1))
    return start.with_tensors({**start.tensors, ALONG: torch.linspace(-0.01, 0.01, 9)})


class PlainModel:
    """PEFT's model at any a."""

    def __init__(self, folder: Path, adapter: Adapter) -> None:
        base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
        lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
        self._model = get_peft_model(base, lora).to(torch.float64)
        named = {
            name.removeprefix("base_model.model.").replace(".default", ""): parameter
            for name, parameter in self._model.named_parameters()
        }
        self._b = [named[f"{module}.lora_B.weight"] for module in adapter.modules()]
        with torch.no_grad():
            for module in adapter.modules():
                named[f"{module}.lora_A.weight"].copy_(adapter.tensors[f"{module}.lora_A.weight"])
        size = sum(b.numel() for b in self._b)
        draws = [np.random.default_rng(int(s)).standard_normal(size, dtype=np.float32) for s in adapter.tensors[SEEDS]]
        self._directions = torch.from_numpy(np.stack(draws)).double()

    @torch.no_grad()
    def loss(self, amounts: Tensor, rows: Sequence[EncodedExample]) -> float:
        parts = (amounts @ self._directions).split([b.numel() for b in self._b])
        for b, part in zip(self._b, parts, strict=True):
            b.copy_(part.view(b.shape))
        return float(mean_loss(self._model, rows))


def tune_plainly(folder: Path, task: TuningTask) -> Tensor:
    model, amounts = PlainModel(folder, task.adapter), task.adapter.tensors[ALONG].double()
    for step in range(task.num_steps):
        rows = [task.examples[i] for i in batch_indices(len(task.examples), 3, step, task.seed)]
        j = int(derive_rng(derive_seed(task.seed, "step", step), "direction").integers(len(amounts)))
        ahead, back = amounts.clone(), amounts.clone()
        ahead[j] += EPSILON
        back[j] -= EPSILON
        amounts[j] -= 1e-2 * (model.loss(ahead, rows) - model.loss(back, rows)) / (2 * EPSILON)
    return amounts


@pytest.mark.parametrize("num_slots", [1, 2, 3])
def test_slopes_along_directions(tiny_model_folder: Path, num_slots: int) -> None:
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    start = started(model)
    tasks = [TuningTask(str(k), make_examples(k, n), start, 0, 6, 6, k) for k, n in enumerate((7, 3, 5))]
    for result in tune(model, tasks, CONFIG, num_slots, trained=(AMOUNTS,)):
        got, expected = result.adapter.tensors[ALONG], tune_plainly(tiny_model_folder, result.task)
        moved = expected - start.tensors[ALONG]
        assert 0 < int((moved != 0).sum()) <= 6
        torch.testing.assert_close(got - start.tensors[ALONG], moved.float(), rtol=1e-3, atol=1e-8)
        assert all(torch.equal(result.adapter.tensors[n], t) for n, t in start.tensors.items() if n != ALONG)


def test_the_slope_is_the_gradient_along_the_direction(tiny_model_folder: Path) -> None:
    """As autograd gives it for a."""
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    start, rows = started(model), make_examples(3, 3)
    (result,) = tune(model, [TuningTask("a", rows, start, 0, 1, 1, 3)], CONFIG, 1, trained=(AMOUNTS,))
    step = result.adapter.tensors[ALONG] - start.tensors[ALONG]
    (j,) = step.nonzero().flatten().tolist()
    plain = PlainModel(tiny_model_folder, start)
    amounts = start.tensors[ALONG].double()
    tiny = torch.zeros_like(amounts)
    tiny[j] = 1e-3  # transformers gives a float32 loss
    slope = (plain.loss(amounts + tiny, rows) - plain.loss(amounts - tiny, rows)) / 2e-3
    assert float(step[j]) == pytest.approx(-1e-2 * slope, rel=0.05)
