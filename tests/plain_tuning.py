"""Local tuning as one would write it: one client, PEFT and torch. What the stack is compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from fedit.adapter import factor_of
from fedit.base import load_base, load_tokenizer
from fedit.config import AdapterConfig, ClientConfig, ModelConfig
from fedit.interfaces import FACTORS, Adapter, EncodedExample, Example, Turn
from fedit.model import StackedModel
from fedit.tuning import TuningTask, batch_indices

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
    base = load_base(ModelConfig(path=str(folder), dtype="float32"), CPU)
    torch.nn.Module.to(base, dtype)
    return StackedModel(base, load_tokenizer(str(folder)), adapter)


def random_adapter(model: StackedModel, seed: int, rank: int) -> Adapter:
    rng = np.random.default_rng(seed)
    full = model.fresh_adapter(rng)
    tensors = {
        name: (
            tensor[:rank] if "lora_A" in name else torch.from_numpy(rng.normal(0, 0.02, (len(tensor), rank))).float()
        )
        for name, tensor in full.tensors.items()
    }
    return Adapter(tensors, rank, model.lora_alpha)


def mean_loss(model: nn.Module, rows: Sequence[EncodedExample]) -> Tensor:
    """The mean loss per response token of one padded batch, by transformers."""
    length = max(len(row) for row in rows)
    input_ids, mask = torch.zeros(len(rows), length, dtype=torch.long), torch.zeros(len(rows), length)
    labels = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        ids = torch.from_numpy(row.input_ids.astype(np.int64))
        input_ids[i, : len(row)], mask[i, : len(row)] = ids, 1
        labels[i, : len(row)] = torch.where(torch.from_numpy(row.supervised), ids, torch.tensor(-100))
    return model(input_ids=input_ids, attention_mask=mask, labels=labels).loss


def peft_model(folder: Path, adapter: Adapter, dtype: torch.dtype) -> tuple[PeftModel, dict[str, nn.Parameter]]:
    """An adapter in PEFT, and its tensors by our names. What lies beside it is folded into the base's weights."""
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for name, matrix in adapter.side.items():
            base.get_parameter(f"{name}.weight").add_(matrix.dense())
    lora = LoraConfig(
        r=adapter.rank, lora_alpha=int(adapter.lora_alpha), target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = get_peft_model(base, lora).to(dtype)
    trained = {
        name.removeprefix("base_model.model.").replace(".default", ""): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert trained.keys() == adapter.tensors.keys()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(adapter.tensors[name])
    return model, trained


def tune_with_peft(
    folder: Path,
    task: TuningTask,
    config: ClientConfig,
    dtype: torch.dtype = torch.float32,
    factors: Sequence[str] = FACTORS,
    loss_of: Callable[[PeftModel, Sequence[EncodedExample], Mapping[str, nn.Parameter]], Tensor] | None = None,
) -> Mapping[str, Tensor]:
    """The reference: one client, one PEFT model, torch's optimizer, a padded batch with a mask, whole-sequence logits.

    What lies beside the adapter is folded into the base's weights. `loss_of` takes the place of the mean loss per
    response token.
    """
    model, trained = peft_model(folder, task.adapter, dtype)
    for name, parameter in trained.items():
        parameter.requires_grad_(factor_of(name) in factors)
    moving = [parameter for parameter in trained.values() if parameter.requires_grad]
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.SGD
    optimizer = kind(
        moving if len(factors) == 1 else list(trained.values()),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
    )
    for done in range(task.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * (1 - (task.first_step + done) / task.total_steps)
        batch = batch_indices(len(task.examples), config.batch_size, task.first_batch + done, task.seed)
        rows = [task.examples[i] for i in batch]
        optimizer.zero_grad()
        (mean_loss(model, rows) if loss_of is None else loss_of(model, rows, trained)).backward()
        if config.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(moving, config.clip_norm)
        optimizer.step()
    return {name: parameter.detach() for name, parameter in trained.items()}


def relative_error(got: Mapping[str, Tensor], expected: Mapping[str, Tensor], start: Mapping[str, Tensor]) -> float:
    """|got - expected| / |expected - start|, over all tensors; start = 0 compares the weights, not the update."""
    error = sum(float((got[name] - expected[name]).double().square().sum()) for name in expected)
    size = sum(float((expected[name] - start[name]).double().square().sum()) for name in expected)
    return (error / size) ** 0.5
