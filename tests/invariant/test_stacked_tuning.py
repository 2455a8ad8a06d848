"""Stacked tuning equals plain PEFT + torch AdamW, client by client."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_tuning import CPU, load, make_examples, peft_model, random_adapter, relative_error, tune_with_peft
from torch import Tensor
from transformers import AutoModelForCausalLM

from fedit.adapter import factor_of
from fedit.batch import Batch
from fedit.config import AdapterConfig, ClientConfig
from fedit.evaluation.heldout import generate_answers
from fedit.interfaces import EncodedExample, EngineError, Example, Turn
from fedit.lowrank import LowRank
from fedit.model import StackedModel
from fedit.tuning import TuningTask, tune


def make_task(
    model: StackedModel, seed: int, count: int, rank: int, num_steps: int, first_step: int = 0, first_batch: int = 0
) -> TuningTask:
    adapter = random_adapter(model, seed, rank)
    return TuningTask(
        f"client{seed}", make_examples(seed, count), adapter, first_step, num_steps, 20, seed, first_batch
    )


CONFIG = ClientConfig(
    local_steps=6, batch_size=4, learning_rate=5e-4, schedule="linear", weight_decay=0.01, clip_norm=0.5
)


def make_tasks(model: StackedModel) -> list[TuningTask]:
    """Ragged client sizes, mixed ranks, uneven steps and starts."""
    return [
        make_task(model, seed=1, count=9, rank=4, num_steps=6),
        make_task(model, seed=2, count=3, rank=6, num_steps=7),
        make_task(model, seed=3, count=17, rank=2, num_steps=5, first_step=3, first_batch=2),
        make_task(model, seed=4, count=1, rank=6, num_steps=9),
        make_task(model, seed=5, count=6, rank=4, num_steps=5),
    ]


@pytest.mark.parametrize("num_slots", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stacked_equals_peft_one_by_one(tiny_model_folder: Path, num_slots: int, dtype: torch.dtype) -> None:
    """Each client's adapter is what plain PEFT gives it alone, whoever shares the stack, with slots refilled or not.

    In float64 the update itself agrees; in float32 the weights do (Adam blows up the rounding of gradients near zero).
    """
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), dtype)
    tasks = make_tasks(model)
    results = {result.task.name: result for result in tune(model, tasks, CONFIG, num_slots)}
    assert results.keys() == {task.name for task in tasks}
    for task in tasks:
        expected = tune_with_peft(tiny_model_folder, task, CONFIG, dtype)
        got, start = results[task.name].adapter, task.adapter.tensors
        if dtype is torch.float32:
            start = {name: torch.zeros_like(tensor) for name, tensor in start.items()}
        assert got.rank == task.adapter.rank
        assert results[task.name].failure is None
        assert relative_error(got.tensors, expected, start) < 1e-5


@pytest.mark.parametrize("factors", [("lora_B",), ("lora_A",)])
def test_a_frozen_factor_does_not_move(tiny_model_folder: Path, factors: Sequence[str]) -> None:
    """Nor count in the clip, nor decay: what is left of PEFT when one factor needs no gradient."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    for result in tune(model, make_tasks(model), CONFIG, 3, trained=factors):
        expected = tune_with_peft(tiny_model_folder, result.task, CONFIG, torch.float64, factors)
        start, got = result.task.adapter.tensors, result.adapter.tensors
        moved = {name for name in got if not torch.equal(got[name].float(), start[name])}
        assert {factor_of(name) for name in moved} == set(factors)
        assert relative_error(got, expected, start) < 1e-5


@pytest.mark.parametrize("rank", [3, 40])
def test_what_lies_beside_acts_as_if_it_were_in_the_base(tiny_model_folder: Path, rank: int) -> None:
    """As factors and, of a large rank, as their product; with other adapters afterwards it is gone."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    rng = np.random.default_rng(4)
    side = {
        layer.name: LowRank(
            torch.from_numpy(rng.normal(0, 0.02, (layer.num_outputs, rank))),
            torch.from_numpy(rng.normal(0, 0.3, (rank, layer.num_inputs))),
        )
        for layer in model.layers[::2]
    }
    plain = make_tasks(model)
    beside = [replace(task, adapter=replace(task.adapter, side=side)) for task in plain]
    for tasks in (beside, plain):
        for result in tune(model, tasks, CONFIG, 3):
            expected = tune_with_peft(tiny_model_folder, result.task, CONFIG, torch.float64)
            assert relative_error(result.adapter.tensors, expected, result.task.adapter.tensors) < 1e-5
            assert result.adapter.side is result.task.adapter.side
    with pytest.raises(EngineError, match="different sides cannot share"):
        list(tune(model, [beside[0], plain[1]], CONFIG, 2))
    with pytest.raises(EngineError, match="not adapted here, first 'nowhere'"):
        model.set_side({"nowhere": LowRank(torch.ones(2, 1), torch.ones(1, 2))})


def test_results_do_not_depend_on_slots_nor_on_how_the_base_is_run(tiny_model_folder: Path) -> None:
    """1, 3 and 8 slots, small batches, padded ones, layers computed again: equal to 1e-9 in float64."""

    def run(num_slots: int, **attributes: object) -> dict[str, Mapping[str, Tensor]]:
        model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12, dropout=0.2), torch.float64)
        for name, value in attributes.items():
            setattr(model, name, value)
        tasks = make_tasks(model) + [make_task(model, seed, 4, 6, num_steps=3) for seed in range(6, 12)]
        start.update({task.name: task.adapter.tensors for task in tasks})
        return {result.task.name: result.adapter.tensors for result in tune(model, tasks, CONFIG, num_slots)}

    start: dict[str, Mapping[str, Tensor]] = {}
    expected = run(8)
    others = [run(1), run(3), run(8, batch_tokens=50), run(8, longest_packed=0), run(3, checkpointing=True)]
    for other in others:
        for name, tensors in expected.items():
            assert relative_error(other[name], tensors, start[name]) < 1e-9


@pytest.mark.parametrize(("clients", "rows"), [(60, 5), (4, 60)])
def test_many_small_clients_and_few_large_ones_fill_the_batches(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, clients: int, rows: int
) -> None:
    """Every client's last batch is small, and all begin together: others step in."""
    model = load(tiny_model_folder, AdapterConfig(rank=2, alpha=4))
    measured, sizes = StackedModel.token_losses, list[int]()

    def token_losses(self: StackedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        sizes.append(sum(length for _, length in batch.rows))
        return measured(self, batch)

    monkeypatch.setattr(StackedModel, "token_losses", token_losses)
    model.batch_tokens = 200
    tasks = [make_task(model, seed, rows, 2, num_steps=-(-rows // CONFIG.batch_size)) for seed in range(clients)]
    assert len(list(tune(model, tasks, CONFIG, 8))) == clients
    assert np.mean(sizes) > 0.8 * 200
    assert max(sizes) <= 200


def test_an_example_can_be_a_slot_of_its_own(tiny_model_folder: Path) -> None:
    """Gradients example by example, in one pass, equal autograd's of each alone: what DP-SGD clips."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    examples, adapter = make_examples(5, 7), random_adapter(model, 1, 6)
    model.allocate(len(examples))
    for slot in range(len(examples)):
        model.write(slot, adapter)
    for _, batch in model.batches(examples, list(range(len(examples)))):
        model.token_losses(batch)[0].sum().backward()
    got = model.take_gradients().clone()
    peft, trained = peft_model(tiny_model_folder, adapter, torch.float64)
    for slot, example in enumerate(examples):
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        peft.zero_grad()
        losses = torch.nn.functional.cross_entropy(peft(input_ids=ids).logits[0, :-1], ids[0, 1:], reduction="none")
        losses[example.supervised[1:]].sum().backward()
        expected = [trained[f"{layer.name}.lora_{f}.weight"].grad for f in "AB" for layer in model.layers]
        flat = torch.cat([gradient.flatten() for gradient in expected if gradient is not None])
        torch.testing.assert_close(got[slot], flat, rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("failing_call", [4, 5])
def test_out_of_memory_halves_the_batches_once(
    tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing_call: int
) -> None:
    """In the middle of a step: what was added up is dropped, and the step is taken again. Not a second time.

    Each step is of two batches here.
    """
    plain = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    expected = {result.task.name: result.adapter.tensors for result in tune(plain, make_tasks(plain), CONFIG, 5)}
    measured, failing, calls = StackedModel.token_losses, {failing_call}, iter(range(1000))

    def token_losses(self: StackedModel, batch: Batch) -> tuple[Tensor, Tensor]:
        if next(calls) in failing:
            raise torch.OutOfMemoryError("no memory")
        return measured(self, batch)

    monkeypatch.setattr(StackedModel, "token_losses", token_losses)
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    model.batch_tokens = 40
    results = {result.task.name: result for result in tune(model, make_tasks(model), CONFIG, 5)}
    assert model.batch_tokens == 20
    assert "going on from the last step with 20 tokens" in caplog.text
    for name, result in results.items():
        assert relative_error(result.adapter.tensors, expected[name], result.task.adapter.tensors) < 1e-9
    failing.update(range(1000))
    with pytest.raises(EngineError, match="Out of memory again with 20 tokens"):
        list(tune(model, make_tasks(model), CONFIG, 5))


def test_a_training_in_pieces_gives_the_bits_of_one_without_pause(tiny_model_folder: Path) -> None:
    """Adapter and moments are all that a training needs to go on, in whatever slot."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12, dropout=0.2))
    task = make_task(model, seed=2, count=7, rank=4, num_steps=9)
    (whole,) = tune(model, [task], CONFIG, 1)
    (first,) = tune(model, [replace(task, num_steps=4)], CONFIG, 1)
    rest = replace(
        task, adapter=first.adapter, first_step=4, first_batch=4, num_steps=5, moments=first.moments, name="rest"
    )
    done = {result.task.name: result for result in tune(model, [rest], CONFIG, 3)}
    assert all(torch.equal(done["rest"].adapter.tensors[name], t) for name, t in whole.adapter.tensors.items())
    ended = done["rest"].moments
    assert ended is not None
    assert whole.moments is not None
    assert torch.equal(ended.second, whole.moments.second)
    assert ended.num_steps == whole.moments.num_steps == 9
    (forgot,) = tune(model, [replace(rest, moments=None)], CONFIG, 1)
    assert not all(torch.equal(forgot.adapter.tensors[name], t) for name, t in whole.adapter.tensors.items())


def test_results_do_not_depend_on_the_slots_with_dropout(tiny_model_folder: Path) -> None:
    """Dropout draws from a generator of the row, so neighbours and refilling change nothing."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12, dropout=0.3), torch.float64)
    runs = [
        {result.task.name: result.adapter.tensors for result in tune(model, make_tasks(model), CONFIG, num_slots)}
        for num_slots in (1, 3, 5)
    ]
    without = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12), torch.float64)
    plain = {result.task.name: result.adapter.tensors for result in tune(without, make_tasks(without), CONFIG, 5)}
    for task in make_tasks(model):
        for other in runs[1:]:
            assert relative_error(other[task.name], runs[0][task.name], task.adapter.tensors) < 1e-6
        assert relative_error(plain[task.name], runs[0][task.name], task.adapter.tensors) > 1e-2


@pytest.mark.parametrize("collate", [Batch.pack, Batch.pad])
def test_losses_equal_the_whole_sequence_logits(
    tiny_model_folder: Path, collate: Callable[[list[EncodedExample], list[int], torch.device], Batch]
) -> None:
    """The head on selected positions of a batch gives the losses of each row alone, with its own adapter."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    adapters = [random_adapter(model, seed, rank) for seed, rank in ((1, 6), (2, 3))]
    model.allocate(3)
    model.write(0, adapters[0])
    model.write(2, adapters[1])
    examples = make_examples(7, 6)
    slots = [0, 2, 1, 2, 0, 1]
    losses, rows = model.token_losses(collate(examples, slots, CPU))
    base = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=torch.float32)
    for row, (example, slot) in enumerate(zip(examples, slots, strict=True)):
        weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
        if slot != 1:
            adapter = adapters[slot // 2]
            for module in adapter.modules():
                b, a = (adapter.tensors[f"{module}.lora_{factor}.weight"] for factor in "BA")
                weights[f"{module}.weight"] += adapter.scaling * b @ a
        ids = torch.from_numpy(example.input_ids.astype(np.int64))[None]
        logits = torch.func.functional_call(base, weights, (ids,)).logits[0, :-1]
        expected = torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none")[example.supervised[1:]]
        torch.testing.assert_close(losses[rows == row], expected, rtol=1e-4, atol=1e-5)


def test_answers_do_not_depend_on_who_shares_the_batch(tiny_model_folder: Path) -> None:
    """A prompt without room for a whole answer (context 512) gets a short one; those of other prompts stay whole."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    adapters = [random_adapter(model, 1, 6), random_adapter(model, 2, 6), None]
    rows = [make_long(length) for length in (10, 505, 300, 505, 511)]
    together = generate_answers(model, adapters, rows, 20)
    for index, row in enumerate(rows):
        alone = generate_answers(model, adapters, [row], 20)
        assert [answers[index] for answers in together] == [answers[0] for answers in alone]
    assert len(together[0][0]) > len(together[0][1]) > 0


def make_long(length: int) -> EncodedExample:
    ids = np.random.default_rng(length).integers(3, 200, length + 1).astype(np.int32)
    return EncodedExample(ids, np.arange(length + 1) >= length, Example((Turn("", ""),)))


def test_a_diverging_client_fails_alone(tiny_model_folder: Path) -> None:
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    tasks = make_tasks(model)
    broken = {name: tensor * float("nan") for name, tensor in tasks[1].adapter.tensors.items()}
    poisoned = [tasks[0], replace(tasks[1], adapter=tasks[1].adapter.with_tensors(broken)), *tasks[2:]]
    healthy = {result.task.name: result for result in tune(model, tasks, CONFIG, 2)}
    results = {result.task.name: result for result in tune(model, poisoned, CONFIG, 2)}
    for name, result in results.items():
        if name == tasks[1].name:
            assert result.failure is not None
            assert "not finite" in result.failure
        else:
            assert result.failure is None
            start = {name: torch.zeros_like(tensor) for name, tensor in result.adapter.tensors.items()}
            assert relative_error(result.adapter.tensors, healthy[name].adapter.tensors, start) < 1e-5


def test_wrong_adapters_are_refused_whole(tiny_model_folder: Path) -> None:
    """A tensor that is missing, unexpected or of another shape raises; nothing is loaded partly."""
    model = load(tiny_model_folder, AdapterConfig(rank=6, alpha=12))
    good = random_adapter(model, 1, 6)
    model.write(0, good)
    before = model.parameters.clone()
    first = next(iter(good.tensors))
    for tensors in (
        {name: tensor for name, tensor in good.tensors.items() if name != first},
        {**good.tensors, "model.layers.9.self_attn.q_proj.lora_A.weight": good.tensors[first]},
        {**good.tensors, first: good.tensors[first][:, :-1]},
    ):
        with pytest.raises(EngineError, match="Nothing was loaded"):
            model.write(0, good.with_tensors(tensors))
        assert torch.equal(model.parameters, before)
    assert all(torch.equal(tensor, good.tensors[name]) for name, tensor in model.read(0, 6).items())
