"""DP-SGD in the stack: gradients row by row, by autograd and by Opacus; noise; sampling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.grad_sample import GradSampleModule
from plain_tuning import load, make_examples, mean_loss, peft_model, random_adapter, relative_error
from torch import Tensor

from fedit.adapter import factor_of
from fedit.config import AdapterConfig, ClientConfig
from fedit.interfaces import FACTORS, EncodedExample
from fedit.model import StackedModel
from fedit.privacy import Draws
from fedit.private_stack import RowPrivacy
from fedit.tuning import TuningTask, tune

CONFIG = ClientConfig(local_steps=4, batch_size=4, optimizer="sgd", learning_rate=0.5, clip_norm=None)


def make_task(model: StackedModel, seed: int, count: int, rank: int, privacy: RowPrivacy) -> TuningTask:
    return TuningTask(
        f"client{seed}",
        make_examples(seed, count),
        random_adapter(model, seed, rank),
        0,
        4,
        20,
        seed,
        0,
        privacy=privacy,
    )


def privacy_of(count: int, clip_norm: float = 0.05, noise: float = 0.0, seed: int = 7) -> RowPrivacy:
    return RowPrivacy(clip_norm, noise, 4 / count, Draws(seed), 4.0)


def rows_of_step(task: TuningTask, step: int) -> list[EncodedExample]:
    assert task.privacy is not None
    drawn = task.privacy.draws.uniform(len(task.examples), task.name, step)
    return [task.examples[i] for i in np.flatnonzero(drawn < task.privacy.share).tolist()]


def tune_row_by_row(folder: Path, task: TuningTask, factors: Sequence[str], dtype: torch.dtype) -> Mapping[str, Tensor]:
    """The reference: a backward pass for each row, clipped and added up."""
    model, trained = peft_model(folder, task.adapter, dtype)
    moving = {name: parameter for name, parameter in trained.items() if factor_of(name) in factors}
    assert task.privacy is not None
    for step in range(task.num_steps):
        sums = {name: torch.zeros_like(parameter) for name, parameter in moving.items()}
        for row in rows_of_step(task, step):
            gradients = torch.autograd.grad(mean_loss(model, [row]), list(moving.values()))
            norm = sum(gradient.square().sum() for gradient in gradients) ** 0.5
            for name, gradient in zip(moving, gradients, strict=True):
                sums[name] += gradient * min(1.0, task.privacy.clip_norm / float(norm))
        with torch.no_grad():
            for name, parameter in moving.items():
                parameter -= CONFIG.learning_rate * sums[name] / task.privacy.num_expected
    return {name: parameter.detach() for name, parameter in trained.items()}


@pytest.mark.parametrize("num_slots", [1, 3])
@pytest.mark.parametrize("factors", [FACTORS, ("lora_B",)])
def test_without_noise_it_is_the_mean_of_clipped_gradients_of_the_rows(
    tiny_model_folder: Path, num_slots: int, factors: tuple[str, ...]
) -> None:
    """Of clients of different sizes and ranks, alone or together; some rows are clipped, and some are not."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    tasks = [
        make_task(model, seed, count, rank, privacy_of(count, clip_norm))
        for seed, count, rank, clip_norm in ((1, 9, 4, 0.05), (2, 5, 6, 0.2), (3, 17, 2, 1e3))
    ]
    results = {result.task.name: result for result in tune(model, tasks, CONFIG, num_slots, trained=factors)}
    for task in tasks:
        expected = tune_row_by_row(tiny_model_folder, task, factors, torch.float64)
        assert results[task.name].failure is None
        assert relative_error(results[task.name].adapter.tensors, expected, task.adapter.tensors) < 1e-5


def test_many_rows_take_several_turns(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    task = make_task(model, 1, 12, 4, RowPrivacy(0.05, 0.0, 1.0, Draws(7), 12.0))
    (whole,) = tune(model, [task], CONFIG, 1)
    monkeypatch.setattr("fedit.private_stack.MOST_ROWS", 5)
    (in_parts,) = tune(model, [task], CONFIG, 1)
    assert relative_error(in_parts.adapter.tensors, whole.adapter.tensors, task.adapter.tensors) < 1e-9


@pytest.mark.filterwarnings("ignore")  # of Opacus' hooks
def test_opacus_has_the_same_gradients_of_rows(tiny_model_folder: Path) -> None:
    """One step of SGD at a rate of 1 on rows of one length is the mean of its clipped gradients."""
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    ids = np.random.default_rng(0).integers(3, 200, (6, 12)).astype(np.int32)
    rows = [replace(row, input_ids=ids[i], supervised=np.arange(12) >= 4) for i, row in enumerate(make_examples(0, 6))]
    privacy = RowPrivacy(0.1, 0.0, 1.0, Draws(7), 6.0)
    task = TuningTask("c", rows, random_adapter(model, 3, 4), 0, 1, 1, 3, 0, privacy=privacy)
    (ours,) = tune(model, [task], ClientConfig(local_steps=1, optimizer="sgd", learning_rate=1.0, clip_norm=None), 1)

    plain, trained = peft_model(tiny_model_folder, task.adapter, torch.float64)
    private = GradSampleModule(plain, loss_reduction="sum", force_functorch=True)
    input_ids = torch.from_numpy(ids.astype(np.int64))
    logits = private(input_ids=input_ids).logits[:, 3:-1]
    losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 4:].flatten(), reduction="none")
    losses.view(6, 8).mean(dim=1).sum().backward()
    of_rows: dict[str, Tensor] = {name: vars(parameter)["grad_sample"] for name, parameter in trained.items()}
    norms = sum(gradients.flatten(1).square().sum(dim=1) for gradients in of_rows.values()) ** 0.5
    factors = (0.1 / norms).clamp(max=1.0)
    assert float(factors.min()) < 1
    for name, gradients in of_rows.items():
        mean = torch.einsum("b,b...->...", factors, gradients) / 6
        torch.testing.assert_close(ours.adapter.tensors[name], task.adapter.tensors[name] - mean, rtol=1e-6, atol=1e-9)


def test_one_row_moves_a_step_by_its_clip_norm_at_most(tiny_model_folder: Path) -> None:
    """With the same draws and noise; the rate is 1, and 4 rows are expected."""
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    config = ClientConfig(local_steps=1, optimizer="sgd", learning_rate=1.0, clip_norm=None)
    task = replace(make_task(model, 1, 6, 4, RowPrivacy(0.05, 1.0, 1.0, Draws(7), 4.0)), num_steps=1)
    (whole,) = tune(model, [task], config, 1)
    for left_out in range(6):
        rows = [row for number, row in enumerate(task.examples) if number != left_out]
        (less,) = tune(model, [replace(task, examples=rows)], config, 1)
        tensors = whole.adapter.tensors
        moved = sum(float((tensors[n] - less.adapter.tensors[n]).square().sum()) for n in tensors) ** 0.5
        assert 0 < moved <= 0.05 / 4 * (1 + 1e-9)


@pytest.mark.parametrize("draws", [Draws(3), Draws(None)], ids=["seeded", "system"])
def test_the_noise_of_every_step_is_of_the_promised_size_and_its_own(tiny_model_folder: Path, draws: Draws) -> None:
    """A client of one row that is never drawn: what its steps do is noise. Half of it would be seen, or a reuse."""
    model = load(tiny_model_folder, AdapterConfig(rank=64, alpha=64))
    config = ClientConfig(local_steps=1, optimizer="sgd", learning_rate=1.0, clip_norm=None)
    steps = []
    for first_step in range(3):
        task = replace(make_task(model, 1, 1, 64, RowPrivacy(0.5, 1.5, 0.0, draws, 4.0)), num_steps=1)
        task = replace(task, first_step=first_step)
        (result,) = tune(model, [task], config, 1)
        step = [result.adapter.tensors[n] - tensor for n, tensor in task.adapter.tensors.items()]
        steps.append(torch.cat([tensor.flatten() for tensor in step]).double())
        assert (result.loss, result.num_tokens, result.failure) == (0.0, 0, None)
    for step in steps:
        assert float(step.std()) == pytest.approx(1.5 * 0.5 / 4, rel=0.01)
        assert abs(float(step.mean())) < 4 * 0.1875 / len(step) ** 0.5
    correlation = np.corrcoef(np.stack([step.numpy() for step in steps]))
    assert np.abs(correlation - np.eye(3)).max() < 0.02


def test_rows_are_drawn_one_by_one(tiny_model_folder: Path) -> None:
    """Each by itself with its probability: sizes of batches vary as a binomial does."""
    model = load(tiny_model_folder, AdapterConfig(rank=1, alpha=1))
    rows = [replace(make_examples(0, 1)[0]) for _ in range(20)]
    task = TuningTask(
        "c", rows, random_adapter(model, 1, 1), 0, 200, 200, 0, privacy=RowPrivacy(1, 0, 0.2, Draws(1), 4)
    )
    tokens: list[int] = []
    (result,) = tune(model, [task], CONFIG, 1, tokens.append)
    sizes = np.asarray(tokens) / len(rows[0])
    assert result.num_tokens == sum(tokens)
    assert np.mean(sizes) == pytest.approx(4, abs=0.5)
    assert np.var(sizes) == pytest.approx(3.2, rel=0.3)


def test_a_step_that_did_not_fit_the_memory_is_done_again_and_not_twice(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedit.private_stack.MOST_ROWS", 5)
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    task = make_task(model, 1, 12, 4, RowPrivacy(0.05, 0.0, 1.0, Draws(7), 12.0))
    (whole,) = tune(model, [task], CONFIG, 1)
    token_losses, calls = model.token_losses, []

    def fail_once(*arguments: Any) -> tuple[Tensor, Tensor]:
        calls.append(arguments)
        if len(calls) == 2:  # the second five rows of the first step
            raise torch.OutOfMemoryError("made up")
        return token_losses(*arguments)

    monkeypatch.setattr(model, "token_losses", fail_once)
    (again,) = tune(model, [task], CONFIG, 1)
    assert len(calls) > 2
    assert relative_error(again.adapter.tensors, whole.adapter.tensors, task.adapter.tensors) < 1e-9


def test_a_row_whose_gradient_is_not_finite_counts_for_nothing_and_nobody_fails(tiny_model_folder: Path) -> None:
    """That a client failed would tell of the row."""
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    broken = make_task(model, 1, 6, 4, RowPrivacy(0.05, 0.0, 1.0, Draws(7), 6.0))
    tensors = {n: torch.full_like(t.double(), 1e200) if "lora_B" in n else t for n, t in broken.adapter.tensors.items()}
    broken = replace(broken, adapter=broken.adapter.with_tensors(tensors))
    healthy = make_task(model, 2, 6, 4, RowPrivacy(0.05, 0.0, 1.0, Draws(7), 6.0))
    (alone,) = tune(model, [healthy], CONFIG, 1)
    results = {result.task.name: result for result in tune(model, [broken, healthy], CONFIG, 2)}
    assert [result.failure for result in results.values()] == [None, None]
    assert np.isfinite(results["client1"].loss)
    for name, tensor in tensors.items():
        assert torch.equal(results["client1"].adapter.tensors[name], tensor.double())
    assert relative_error(results["client2"].adapter.tensors, alone.adapter.tensors, healthy.adapter.tensors) < 1e-9


def test_noise_stays_within_a_smaller_rank(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    task = make_task(model, 1, 6, 2, privacy_of(6, noise=1.0))
    (result,) = tune(model, [task], CONFIG, 1)
    assert result.failure is None
    for _, (a, b) in model.views(model.parameters):
        assert not a[0, 2:].any()
        assert not b[0, :, 2:].any()
        assert a[0, :2].any()


def test_a_task_is_the_same_in_any_slot_and_company(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, AdapterConfig(rank=4, alpha=8), torch.float64)
    tasks = [make_task(model, seed, 8, 4, privacy_of(8, noise=1.0)) for seed in (1, 2, 3)]
    together = {result.task.name: result.adapter for result in tune(model, tasks, CONFIG, 3)}
    for task in tasks:
        (alone,) = tune(model, [task], CONFIG, 1)
        assert relative_error(together[task.name].tensors, alone.adapter.tensors, task.adapter.tensors) < 1e-9
