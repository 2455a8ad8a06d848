"""Clients that train cores side by side equal plain torch, client by client; and PEFT's TinyLoRA."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import TinyLoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from fedit.adapter import CORE, TIED, VECTORS, Adapter
from fedit.aggregation import FedSB, TinyLoRA
from fedit.base import load_base, load_tokenizer
from fedit.config import AdapterConfig, ClientConfig, ModelConfig
from fedit.interfaces import EncodedExample, Example, Turn
from fedit.model import StackedModel
from fedit.tuning import TuningTask, batch_indices, tune

CONFIG = ClientConfig(local_steps=6, batch_size=3, learning_rate=5e-3, weight_decay=0.01, clip_norm=0.5)
RULES = {"fed-sb": FedSB(), "tied": TinyLoRA(u=5), "tied in threes": TinyLoRA(u=7, num_vectors=3)}


def make_examples(seed: int, count: int) -> list[EncodedExample]:
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(count):
        length = int(rng.integers(6, 25))
        ids = rng.integers(3, 200, length).astype(np.int32)
        examples.append(EncodedExample(ids, np.arange(length) >= length // 2, Example((Turn("", ""),))))
    return examples


def load(folder: Path) -> StackedModel:
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), torch.device("cpu"))
    nn.Module.to(base, torch.float64)
    return StackedModel(base, load_tokenizer(str(folder)), AdapterConfig(rank=4, alpha=6))


def started(model: StackedModel, rule: FedSB | TinyLoRA, seed: int) -> Adapter:
    """An adapter of the rule, with cores that are not zero."""
    start = rule.initial(model.fresh_adapter(np.random.default_rng(0)), model.weight, np.random.default_rng(1))
    moved = start.only([CORE, VECTORS])
    draw = np.random.default_rng(seed)
    return start.with_tensors(
        {**start.tensors} | {n: torch.from_numpy(draw.normal(0, 0.1, tuple(t.shape))) for n, t in moved.items()}
    )


class CoreLinear(nn.Module):
    """W0 x + s B R A x, where R is trained itself or made of a vector."""

    def __init__(self, base: nn.Linear, adapter: Adapter, name: str, trained: dict[str, nn.Parameter], group: int):
        super().__init__()
        self.base, self.scaling = base, adapter.lora_alpha / adapter.rank
        self.a, self.b = (adapter.tensors[f"{name}.lora_{factor}.weight"].double() for factor in "AB")
        self.core = trained.get(f"{name}.lora_R.weight")
        if self.core is None:
            self.vectors, self.group = trained[TIED], group
            self.projections = adapter.tensors[f"{name}.lora_P.weight"].double()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        core = self.core
        if core is None:
            terms = zip(self.vectors[self.group], self.projections, strict=True)
            core = torch.stack([number * matrix for number, matrix in terms]).sum(dim=0)
        return self.base(x) + self.scaling * (x @ self.a.T @ core.T @ self.b.T)


def tune_plainly(folder: Path, task: TuningTask, group_size: int) -> dict[str, torch.Tensor]:
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    base.requires_grad_(False)
    trained = {n: nn.Parameter(t.clone().double()) for n, t in task.adapter.only([CORE, VECTORS]).items()}
    for index, name in enumerate(task.adapter.modules()):
        parent, _, child = name.rpartition(".")
        layer = base.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        num_groups = len(trained[TIED]) if TIED in trained else 1
        group = min(index // group_size, num_groups - 1)
        setattr(base.get_submodule(parent), child, CoreLinear(layer, task.adapter, name, trained, group))
    optimizer = torch.optim.AdamW(trained.values(), lr=CONFIG.learning_rate, weight_decay=CONFIG.weight_decay)
    for step in range(task.num_steps):
        rows = [task.examples[i] for i in batch_indices(len(task.examples), CONFIG.batch_size, step, task.seed)]
        losses = []
        for row in rows:
            ids = torch.from_numpy(row.input_ids.astype(np.int64))
            logits = base(input_ids=ids[None]).logits[0, :-1]
            loss = nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            losses.append(loss[torch.from_numpy(row.supervised[1:])])
        optimizer.zero_grad()
        torch.cat(losses).mean().backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), 0.5)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("num_slots", [1, 2, 3])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_cores_side_by_side_equal_plain_torch(tiny_model_folder, rule, num_slots: int) -> None:
    model = load(tiny_model_folder)
    adapters = [started(model, rule, seed=5)] * 3
    tasks = [
        TuningTask(str(k), make_examples(k, count), adapter, 0, steps, steps, seed=k)
        for k, (count, steps, adapter) in enumerate(zip((7, 2, 4), (6, 3, 5), adapters, strict=True))
    ]
    num_modules = len(adapters[0].modules())
    group_size = num_modules // 3 if rule is RULES["tied in threes"] else num_modules
    results = {r.task.name: r for r in tune(model, tasks, CONFIG, num_slots, trained=rule.trained(0))}
    for task in tasks:
        got, expected = results[task.name].adapter.tensors, tune_plainly(tiny_model_folder, task, group_size)
        for name, tensor in task.adapter.tensors.items():
            assert (name in expected) == (not torch.equal(got[name].double(), tensor.double())), name
        for name, tensor in expected.items():
            torch.testing.assert_close(got[name].double(), tensor, rtol=1e-7, atol=1e-9)


def test_is_the_tinylora_of_peft(tiny_model_folder) -> None:
    """With PEFT's own frozen tensors and v, every layer changes by the same matrix; but for the scaling, 1 there."""
    model = load(tiny_model_folder)
    config = TinyLoraConfig(r=4, u=6, weight_tying=0.8, target_modules=model.target_names(), init_weights=False)
    peft_model = get_peft_model(AutoModelForCausalLM.from_pretrained(tiny_model_folder), config)
    layers = {
        name.removeprefix("base_model.model."): layer
        for name, layer in peft_model.named_modules()
        if hasattr(layer, "tinylora_P")
    }
    tensors, vectors = {}, {}
    for name, layer in layers.items():
        for ours, theirs in (("A", layer.tinylora_A), ("B", layer.tinylora_B), ("P", layer.tinylora_P)):
            tensors[f"{name}.lora_{ours}.weight"] = theirs["default"]
        key = layer._tinylora_v_key["default"]
        vectors[int(key)] = layer.tinylora_v["default"][key].detach().normal_(generator=torch.manual_seed(int(key)))
    tensors[TIED] = torch.stack([vectors[group] for group in range(len(vectors))])
    assert 1 < len(vectors) < len(layers)
    plain = Adapter(tensors, rank=4, lora_alpha=4.0).plain()
    for name, layer in layers.items():
        ours = plain.tensors[f"{name}.lora_B.weight"] @ plain.tensors[f"{name}.lora_A.weight"]
        torch.testing.assert_close(ours, layer.get_delta_weight("default"))


@pytest.mark.parametrize("rule", [FedSB(), TinyLoRA()], ids=["fed-sb", "tinylora"])
def test_starts_from_the_leading_singular_vectors(tiny_model_folder, rule) -> None:
    model = load(tiny_model_folder)
    start = rule.initial(model.fresh_adapter(np.random.default_rng(0)), model.weight, np.random.default_rng(1))
    again = rule.initial(model.fresh_adapter(np.random.default_rng(0)), model.weight, np.random.default_rng(1))
    for module in start.modules():
        a, b = (start.tensors[f"{module}.lora_{factor}.weight"].double() for factor in "AB")
        assert torch.equal(start.tensors[f"{module}.lora_A.weight"], again.tensors[f"{module}.lora_A.weight"])
        weight = model.weight(module).double()
        u, s, vh = torch.linalg.svd(weight)
        expected, tolerance = (u[:, :4] * s[:4]) @ vh[:4], 2e-3 * float(s[0])
        sizes = torch.ones(4) if isinstance(rule, TinyLoRA) else (b.T @ weight @ a.T).diag()
        torch.testing.assert_close(b * sizes @ a, expected, rtol=0, atol=tolerance)
