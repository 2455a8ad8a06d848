"""What every registered aggregation must satisfy, against the dense sum_k p_k s_k B_k A_k."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, Aggregation, ClientUpdate, ConfigError, plugins

load_plugins()

LAYERS = {"wide": (3, 8), "tall": (9, 4)}
"""(outputs, inputs); with three clients of rank 4 the stacked factors are larger than either side."""
RANK, LORA_ALPHA = 4, 6.0
SEEDS = st.integers(0, 2**32)
COUNTS = st.lists(st.integers(1, 50), min_size=2, max_size=4)


@pytest.fixture(scope="module", params=plugins("aggregation"))
def rule(request: pytest.FixtureRequest) -> Aggregation:
    return plugins("aggregation")[request.param]()  # type: ignore[return-value]


@dataclass(frozen=True)
class Round:
    """A global adapter and what clients made of it."""

    adapter: Adapter
    updates: Sequence[ClientUpdate]

    @classmethod
    def random(cls, counts: Sequence[int], seed: int, ranks: Sequence[int] = (RANK,)) -> Round:
        rng = np.random.default_rng(seed)
        adapter = random_adapter(rng)
        updates = []
        for client, num_examples in enumerate(counts):
            received = adapter.cut(ranks[client % len(ranks)])
            step = {name: tensor + normal(rng, *tensor.shape) for name, tensor in received.tensors.items()}
            updates.append(ClientUpdate(str(client), received.with_tensors(step), num_examples, 100, 1.0))
        return cls(adapter, updates)


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def random_adapter(rng: np.random.Generator) -> Adapter:
    tensors = {}
    for layer, (num_outputs, num_inputs) in LAYERS.items():
        tensors[f"{layer}.lora_A.weight"] = normal(rng, RANK, num_inputs)
        tensors[f"{layer}.lora_B.weight"] = normal(rng, num_outputs, RANK)
    return Adapter(tensors, RANK, LORA_ALPHA)


def effect(adapter: Adapter, step: dict[str, Tensor] | None = None) -> Tensor:
    """Return s B A of all layers, dense, flat, float64."""
    dense = []
    for layer in LAYERS:
        b, a = (
            adapter.tensors[name].double() + (0 if step is None else step[name].double())
            for name in (f"{layer}.lora_B.weight", f"{layer}.lora_A.weight")
        )
        dense.append((adapter.scaling * b @ a).flatten())
    return torch.cat(dense)


def client_effect(adapter: Adapter, result: ClientUpdate) -> Tensor:
    return effect(adapter.cut(result.update.rank), dict(result.update.tensors))


def exact_mean(case: Round) -> Tensor:
    total = sum(result.num_examples for result in case.updates)
    effects = [client_effect(case.adapter, result) * (result.num_examples / total) for result in case.updates]
    return torch.stack(effects).sum(dim=0)


def aggregated(rule: Aggregation, case: Round) -> Tensor:
    """Return what the new global adapter does."""
    return effect(case.adapter, dict(rule.aggregate(case.adapter, iter(case.updates)).delta))


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- identities


@settings(max_examples=25, deadline=None)
@given(num_examples=st.integers(1, 1000), seed=SEEDS)
def test_one_client_alone_is_the_result(rule, num_examples, seed) -> None:
    case = Round.random([num_examples], seed)
    assert_same(aggregated(rule, case), client_effect(case.adapter, case.updates[0]))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_equal_updates_are_the_result(rule, counts, seed) -> None:
    case = Round.random([1], seed)
    same = [replace(case.updates[0], client=str(k), num_examples=count) for k, count in enumerate(counts)]
    result = rule.aggregate(case.adapter, iter(same))
    assert_same(effect(case.adapter, dict(result.delta)), client_effect(case.adapter, case.updates[0]))
    assert result.metrics["aggregation_loss"] < 1e-10


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_permuted_clients_give_the_same(rule, counts, seed) -> None:
    case = Round.random(counts, seed)
    assert_same(aggregated(rule, Round(case.adapter, case.updates[::-1])), aggregated(rule, case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_client_without_rows_counts_nothing(rule, counts, seed) -> None:
    case = Round.random([*counts, 0], seed)
    assert_same(aggregated(rule, case), aggregated(rule, Round(case.adapter, case.updates[:-1])))
    # Nor does it where it comes first, and starts the sums.
    assert_same(aggregated(rule, Round(case.adapter, case.updates[::-1])), aggregated(rule, case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_weights_renormalise_over_those_who_answered(rule, counts, seed) -> None:
    """Only the ratios of the counts matter: without the last client, and with all of them ten times larger."""
    case = Round.random(counts, seed)
    answered = case.updates[:-1]
    larger = [replace(result, num_examples=10 * result.num_examples) for result in answered]
    assert_same(aggregated(rule, Round(case.adapter, answered)), aggregated(rule, Round(case.adapter, larger)))


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_the_reported_loss_is_the_true_one(rule, counts, seed) -> None:
    """||sum_k p_k s_k B_k A_k - kept||_F / ||sum_k p_k s_k B_k A_k||_F, all dense, uneven weights."""
    case = Round.random(counts, seed)
    result = rule.aggregate(case.adapter, iter(case.updates))
    exact, kept = exact_mean(case), effect(case.adapter, dict(result.delta))
    expected = float((exact - kept).norm() / exact.norm())
    assert result.metrics["aggregation_loss"] == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_clients_that_share_a_factor_lose_nothing(rule, counts, seed) -> None:
    """With one A for all, the mean of the products is B_mean A, of no more than the rank: exact for any rule."""
    case = Round.random(counts, seed)
    first = case.updates[0].update.tensors
    shared = {name: tensor for name, tensor in first.items() if name.endswith("lora_A.weight")}
    updates = [
        replace(result, update=result.update.with_tensors({**result.update.tensors, **shared}))
        for result in case.updates
    ]
    case = Round(case.adapter, updates)
    assert_same(aggregated(rule, case), exact_mean(case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_product_rule_does_not_see_rotations(rule, counts, seed) -> None:
    """(B Q)(Q^T A) is B A. A rule that keeps the factors' basis must see them, so it is asked for the opposite."""
    case = Round.random(counts, seed)
    received, rng = case.adapter, np.random.default_rng(seed + 1)
    rotated = []
    for result in case.updates:
        step = {}
        q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(RANK, RANK)))).Q
        for name, tensor in result.update.tensors.items():
            tuned = received.tensors[name].double() + tensor.double()
            step[name] = (q.T @ tuned if name.endswith("lora_A.weight") else tuned @ q) - received.tensors[name]
        rotated.append(replace(result, update=received.with_tensors(step)))
    got, expected = aggregated(rule, Round(received, rotated)), aggregated(rule, case)
    if rule.refactors:
        assert_same(got, expected)
    else:
        assert (got - expected).norm() > 1e-3 * expected.norm()


# ------------------------------------------------------------------------------------------------------ mixed ranks


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=3), seed=SEEDS)
def test_mixed_ranks_count_with_their_own_scaling(rule, counts, ranks, seed) -> None:
    if not rule.mixed_ranks:
        with pytest.raises(ConfigError, match="equal rank"):
            parse_config({"adapter": {"rank": [1, 2]}, "aggregation": rule.name})
        return
    case = Round.random(counts, seed, ranks)
    result = rule.aggregate(case.adapter, iter(case.updates))
    exact, kept = exact_mean(case), effect(case.adapter, dict(result.delta))
    expected = float((exact - kept).norm() / exact.norm())
    assert result.metrics["aggregation_loss"] == pytest.approx(expected, rel=1e-9, abs=1e-10)
    if len(counts) * max(ranks) <= min(min(shape) for shape in LAYERS.values()):
        assert_same(kept, exact)


@settings(max_examples=25, deadline=None)
@given(rank=st.integers(1, RANK), seed=SEEDS)
def test_a_cut_adapter_does_what_its_first_components_do(rank, seed) -> None:
    whole = random_adapter(np.random.default_rng(seed))
    dense = []
    for layer in LAYERS:
        b, a = whole.tensors[f"{layer}.lora_B.weight"].double(), whole.tensors[f"{layer}.lora_A.weight"].double()
        dense.append((whole.scaling * b[:, :rank] @ a[:rank]).flatten())
    torch.testing.assert_close(effect(whole.cut(rank)), torch.cat(dense), rtol=1e-5, atol=1e-5)


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_refactored_adapter_is_balanced_and_ordered(rule, counts, seed) -> None:
    """||b_i|| = ||a_i||, the largest first: what a client of rank r_k receives is the best part of its size."""
    if not rule.refactors:
        pytest.skip("keeps the factors' basis")
    case = Round.random(counts, seed)
    delta = rule.aggregate(case.adapter, iter(case.updates)).delta
    for layer in LAYERS:
        b, a = (case.adapter.tensors[n] + delta[n] for n in (f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"))
        sizes = b.norm(dim=0)
        kept = sizes > 1e-6
        torch.testing.assert_close(sizes[kept], a.norm(dim=1)[kept], rtol=1e-6, atol=1e-6)
        assert bool((sizes.diff() <= 1e-6).all())
        assert bool((a.norm(dim=1) > 0).all()), "a component with A = B = 0 could never be trained again"


# --------------------------------------------------------------------------------------------------------- contract


def test_reads_the_updates_once_and_one_by_one(rule) -> None:
    """As a stream: when the next update is asked for, nothing of the one before may be needed."""
    case = Round.random([3, 1, 2], seed=0)
    expected = rule.aggregate(case.adapter, iter(case.updates)).delta
    asked = []

    def stream():
        for result in case.updates:
            asked.append(result.client)
            tensors = {name: tensor.clone() for name, tensor in result.update.tensors.items()}
            yield replace(result, update=result.update.with_tensors(tensors))
            for tensor in tensors.values():
                tensor.fill_(float("nan"))

    delta = rule.aggregate(case.adapter, stream()).delta
    assert asked == ["0", "1", "2"]
    assert all(torch.equal(delta[name], expected[name]) for name in expected)


def test_returns_a_step_of_every_tensor_in_float64_and_changes_nothing(rule) -> None:
    case = Round.random([3, 1], seed=0)
    before = [{n: t.clone() for n, t in a.tensors.items()} for a in (case.adapter, *(u.update for u in case.updates))]
    delta = rule.aggregate(case.adapter, iter(case.updates)).delta
    assert {name: step.shape for name, step in delta.items()} == {n: t.shape for n, t in case.adapter.tensors.items()}
    assert {step.dtype for step in delta.values()} == {torch.float64}
    after = [case.adapter, *(result.update for result in case.updates)]
    assert all(torch.equal(old[n], new.tensors[n]) for old, new in zip(before, after, strict=True) for n in old)


def test_adds_in_float64(rule) -> None:
    """Two clients far apart that cancel: float32 sums would keep seven digits of the large part, not of the small."""
    case = Round.random([1, 1, 1], seed=0)
    large = {name: torch.full_like(tensor, 2.0**24) for name, tensor in case.adapter.tensors.items()}
    if rule.refactors:
        pytest.skip("the products of such factors do not cancel")
    small = {name: torch.ones_like(tensor) for name, tensor in case.adapter.tensors.items()}
    steps = [large, small, {name: -tensor for name, tensor in large.items()}]
    updates = [
        replace(result, update=case.adapter.with_tensors(step))
        for result, step in zip(case.updates, steps, strict=True)
    ]
    delta = rule.aggregate(case.adapter, iter(updates)).delta
    assert all(torch.allclose(step, torch.full_like(step, 1 / 3), rtol=1e-12) for step in delta.values())


def test_the_same_twice_gives_the_same_bits(rule) -> None:
    case = Round.random([3, 1, 2], seed=5)
    first, second = (rule.aggregate(case.adapter, iter(case.updates)) for _ in range(2))
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)
    assert first.metrics == second.metrics


def test_serialises_and_loads_back(rule) -> None:
    assert Aggregation.resolve(rule.model_dump(mode="json")) == rule
