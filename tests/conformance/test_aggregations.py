"""What every registered aggregation must satisfy, against the dense sum_k p_k s_k B_k A_k."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedit.adapter import factor_of
from fedit.aggregation.merging import Merged
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, Aggregate, Aggregation, ClientUpdate, ConfigError, plugins
from fedit.lowrank import LowRank
from fedit.server import next_side

load_plugins()

LAYERS = {"wide": (3, 8), "tall": (9, 4)}
"""(outputs, inputs); with three clients of rank 4 the stacked factors are larger than either side."""
RANK, LORA_ALPHA = 4, 6.0
SMALLER = {"fedkseed": {"seeds": 12}}
"""Parameters that a small test wants otherwise."""
SEEDS = st.integers(0, 2**32)
COUNTS = st.lists(st.integers(1, 50), min_size=2, max_size=4)


@pytest.fixture(scope="module", params=plugins("aggregation"))
def rule(request: pytest.FixtureRequest) -> Aggregation:
    return Aggregation.resolve({"name": request.param, **SMALLER.get(request.param, {})})


@pytest.fixture(scope="module")
def measured_rule(rule: Aggregation) -> Aggregation:
    """A rule that knows the mean of the products: one whose clients keep a factor to themselves cannot."""
    if set(rule.shared(0)) != set(rule.trained(0)):
        pytest.skip("the server does not see all that clients train")
    return rule


@dataclass(frozen=True)
class Round:
    """A global adapter, with something beside it, and what clients made of it under a rule in its first round."""

    rule: Aggregation
    adapter: Adapter
    updates: Sequence[ClientUpdate]

    @classmethod
    def random(cls, rule: Aggregation, counts: Sequence[int], seed: int, ranks: Sequence[int] = (RANK,)) -> Round:
        rng = np.random.default_rng(seed)
        adapter = rule.initial(random_adapter(rng), lambda layer: normal(rng, *LAYERS[layer]), rng)
        moved = {name: normal(rng, *tensor.shape) for name, tensor in adapter.only(rule.trained(0)).items()}
        adapter = adapter.with_tensors({**adapter.tensors, **moved})
        if rule.keeps_side:
            side = {layer: LowRank(normal(rng, m, 2), normal(rng, 2, n)) for layer, (m, n) in LAYERS.items()}
            adapter = replace(adapter, side=side)
        updates = []
        for client, num_examples in enumerate(counts):
            received = adapter.cut(ranks[client % len(ranks)])
            step = {name: tensor + normal(rng, *tensor.shape) for name, tensor in received.only(rule.shared(0)).items()}
            weight = num_examples if rule_weighting(rule) == "examples" else num_examples and 1
            update = Adapter(step, received.rank, LORA_ALPHA)
            updates.append(ClientUpdate(str(client), update, weight, 100, 1.0, 5))
        return cls(rule, adapter, updates)

    def aggregate(self, updates: Iterable[ClientUpdate] | None = None) -> Aggregate:
        given = iter(self.updates) if updates is None else updates
        return self.rule.aggregate(self.adapter, given, np.random.default_rng(7))

    def but(self, updates: Sequence[ClientUpdate]) -> Round:
        return replace(self, updates=updates)


def rule_weighting(rule: Aggregation) -> str:
    return getattr(rule, "weighting", "examples")


def normal(rng: np.random.Generator, *shape: int) -> Tensor:
    return torch.from_numpy(rng.normal(size=shape).astype(np.float32))


def random_adapter(rng: np.random.Generator) -> Adapter:
    tensors = {}
    for layer, (num_outputs, num_inputs) in LAYERS.items():
        tensors[f"{layer}.lora_A.weight"] = normal(rng, RANK, num_inputs)
        tensors[f"{layer}.lora_B.weight"] = normal(rng, num_outputs, RANK)
    return Adapter(tensors, RANK, LORA_ALPHA)


def effect(adapter: Adapter, step: dict[str, Tensor] | None = None) -> Tensor:
    """Return s B A, or s B R A, of all layers, dense, flat, float64."""
    moved = {name: tensor.double() + (step or {}).get(name, 0) for name, tensor in adapter.tensors.items()}
    dense, start = [], 0
    for layer, (num_outputs, _) in LAYERS.items():
        b, a = moved[f"{layer}.lora_B.weight"], moved[f"{layer}.lora_A.weight"]
        if "tied.lora_seeds.weight" in moved:  # one direction over the B of all layers
            size = sum(num_outputs for num_outputs, _ in LAYERS.values()) * adapter.rank
            for amount, seed in zip(
                moved["tied.lora_a.weight"], adapter.tensors["tied.lora_seeds.weight"], strict=True
            ):
                z = np.random.default_rng(int(seed)).standard_normal(size, dtype=np.float32)
                part = torch.from_numpy(z[start : start + b.numel()].astype(np.float64))
                b = b + amount * part.view(num_outputs, adapter.rank)
            start += b.numel()
        if f"{layer}.lora_R.weight" in moved:
            b = b @ moved[f"{layer}.lora_R.weight"]
        if f"{layer}.lora_P.weight" in moved:
            (vector,), matrices = moved["tied.lora_v.weight"], moved[f"{layer}.lora_P.weight"]
            b = b @ torch.stack([v * matrix for v, matrix in zip(vector, matrices, strict=True)]).sum(dim=0)
        dense.append((adapter.scaling * b @ a).flatten())
    return torch.cat(dense)


def beside(side: Mapping[str, LowRank]) -> Tensor:
    """Return what lies beside an adapter, dense, flat, float64."""
    dense = []
    for layer, (num_outputs, num_inputs) in LAYERS.items():
        matrix = side.get(layer)
        zero = torch.zeros(num_outputs, num_inputs, dtype=torch.float64)
        dense.append((zero if matrix is None else matrix.b.double() @ matrix.a.double()).flatten())
    return torch.cat(dense)


def client_effect(adapter: Adapter, result: ClientUpdate) -> Tensor:
    return effect(adapter.cut(result.update.rank), dict(result.update.tensors))


def exact_mean(case: Round) -> Tensor:
    effects = [client_effect(case.adapter, result) for result in case.updates]
    weights = [float(result.num_examples) for result in case.updates]
    if rule_weighting(case.rule) == "norm":
        weights = [float(done.norm()) for done in effects]
    return torch.stack([done * (weight / sum(weights)) for done, weight in zip(effects, weights, strict=True)]).sum(0)


def kept(case: Round, result: Aggregate) -> Tensor:
    """Return what the new global model does beyond the base and what lay beside the old adapter."""
    gained = beside(result.side_step) - (beside(case.adapter.side) if result.replaces_side else 0)
    return effect(case.adapter, dict(result.delta)) + gained


def aggregated(case: Round) -> Tensor:
    return kept(case, case.aggregate())


def assert_same(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------- identities


@settings(max_examples=25, deadline=None)
@given(num_examples=st.integers(1, 1000), seed=SEEDS)
def test_one_client_alone_is_the_result(measured_rule, num_examples, seed) -> None:
    case = Round.random(exactly(measured_rule), [num_examples], seed)
    assert_same(aggregated(case), client_effect(case.adapter, case.updates[0]))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_equal_updates_are_the_result(measured_rule, counts, seed) -> None:
    case = Round.random(exactly(measured_rule), [1], seed)
    same = [replace(case.updates[0], client=str(k), num_examples=count) for k, count in enumerate(counts)]
    result = case.aggregate(iter(same))
    assert_same(kept(case, result), client_effect(case.adapter, case.updates[0]))
    assert result.metrics["aggregation_loss"] < 1e-10


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_permuted_clients_give_the_same(rule, counts, seed) -> None:
    case = Round.random(rule, counts, seed)
    assert_same(aggregated(case.but(case.updates[::-1])), aggregated(case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_client_without_rows_counts_nothing(rule, counts, seed) -> None:
    if rule_weighting(rule) == "norm":
        pytest.skip("rows are no weight")
    case = Round.random(rule, [*counts, 0], seed)
    assert_same(aggregated(case), aggregated(case.but(case.updates[:-1])))
    # Nor does it where it comes first, and starts the sums.
    assert_same(aggregated(case.but(case.updates[::-1])), aggregated(case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_weights_renormalise_over_those_who_answered(rule, counts, seed) -> None:
    """Only the ratios of the counts matter: without the last client, and with all of them ten times larger."""
    case = Round.random(rule, counts, seed)
    answered = case.updates[:-1]
    larger = [replace(result, num_examples=10 * result.num_examples) for result in answered]
    assert_same(aggregated(case.but(answered)), aggregated(case.but(larger)))


@settings(max_examples=40, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_the_reported_loss_is_the_true_one(measured_rule, counts, seed) -> None:
    """||sum_k p_k s_k B_k A_k - kept||_F / ||sum_k p_k s_k B_k A_k||_F, all dense, uneven weights."""
    case = Round.random(measured_rule, counts, seed)
    result = case.aggregate()
    exact = exact_mean(case)
    expected = float((exact - kept(case, result)).norm() / exact.norm())
    assert result.metrics["aggregation_loss"] == pytest.approx(expected, rel=1e-9, abs=1e-10)


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_clients_that_share_a_factor_lose_nothing(measured_rule, counts, seed) -> None:
    """With one A for all, the mean of the products is B_mean A, of no more than the rank: exact for any rule."""
    case = Round.random(exactly(measured_rule), counts, seed)
    first = case.updates[0].update.tensors
    shared = {name: tensor for name, tensor in first.items() if factor_of(name) == "lora_A"}
    updates = [
        replace(result, update=result.update.with_tensors({**result.update.tensors, **shared}))
        for result in case.updates
    ]
    case = case.but(updates)
    if measured_rule.robust:
        pytest.skip("is no mean")
    if measured_rule.name == "fedrot-lora":
        pytest.skip("clients that share a factor are turned apart, each to fit what it received")
    assert_same(aggregated(case), exact_mean(case))


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_a_rule_that_claims_it_does_not_see_rotations(rule, counts, seed) -> None:
    """(B Q)(Q^T A) is B A. A rule that does not claim it, and averages both factors, must see them."""
    case = Round.random(rule, counts, seed)
    if len(rule.shared(0)) < 2:
        assert not rule.rotation_invariant
        return
    received, rng = case.adapter, np.random.default_rng(seed + 1)
    rotated = []
    for result in case.updates:
        step = {}
        q = torch.linalg.qr(torch.from_numpy(rng.normal(size=(RANK, RANK)))).Q
        for name, tensor in result.update.tensors.items():
            tuned = received.tensors[name].double() + tensor.double()
            step[name] = (q.T @ tuned if factor_of(name) == "lora_A" else tuned @ q) - received.tensors[name]
        rotated.append(replace(result, update=result.update.with_tensors(step)))
    got, expected = aggregated(case.but(rotated)), aggregated(case)
    if rule.rotation_invariant:
        assert_same(got, expected)
    elif not rule.robust:  # which may take one client's update whole
        assert (got - expected).norm() > 1e-3 * expected.norm()


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_rules_that_keep_the_rest_beside_lose_nothing(rule, counts, seed) -> None:
    """The new adapter and what lies beside it do M beyond the old side, and still do as float32."""
    if not rule.keeps_side:
        pytest.skip("keeps nothing beside the adapter")
    case = Round.random(exactly(rule), counts, seed)
    result = case.aggregate()
    assert result.metrics["aggregation_loss"] < 1e-10
    assert_same(kept(case, result), exact_mean(case))
    after = effect(case.adapter, dict(result.delta)) + beside(next_side(case.adapter, result))
    expected = beside(case.adapter.side) + exact_mean(case)
    assert (after - expected).norm() < 1e-6 * expected.norm()


def exactly(rule: Aggregation) -> Aggregation:
    """Return the rule with what it may lose on purpose set to nothing."""
    return rule.model_copy(update={"energy": 1.0}) if "energy" in type(rule).model_fields else rule


# ------------------------------------------------------------------------------------------------------ mixed ranks


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, ranks=st.lists(st.integers(1, RANK), min_size=1, max_size=3), seed=SEEDS)
def test_mixed_ranks_count_with_their_own_scaling(rule, counts, ranks, seed) -> None:
    if not rule.mixed_ranks:
        with pytest.raises(ConfigError, match="equal rank"):
            parse_config({"adapter": {"rank": [1, 2]}, "aggregation": rule.name})
        return
    case = Round.random(exactly(rule), counts, seed, ranks)
    result = case.aggregate()
    exact = exact_mean(case)
    expected = float((exact - kept(case, result)).norm() / exact.norm())
    assert result.metrics["aggregation_loss"] == pytest.approx(expected, rel=1e-9, abs=1e-10)
    one = case.but(case.updates[:1])
    if not rule.refactors or len(set(ranks)) == 1 or rule.keeps_side:
        assert_same(aggregated(one), exact_mean(one))


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
def test_a_refactored_adapter_can_be_trained(rule, counts, seed) -> None:
    """No component has A = B = 0, from which none could grow, not even where all clients returned B = 0."""
    if not rule.refactors:
        pytest.skip("keeps the factors' basis")
    case = Round.random(rule, counts, seed)
    zero = []
    for result in case.updates:
        step = {
            name: -case.adapter.tensors[name] if factor_of(name) == "lora_B" else tensor
            for name, tensor in result.update.tensors.items()
        }
        zero.append(replace(result, update=result.update.with_tensors(step)))
    for updates in (case.updates, zero):
        delta = case.aggregate(iter(updates)).delta
        for layer in LAYERS:
            name = f"{layer}.lora_A.weight"
            assert bool(((case.adapter.tensors[name] + delta[name]).norm(dim=1) > 0).all())


@settings(max_examples=25, deadline=None)
@given(counts=COUNTS, seed=SEEDS)
def test_largest_components_come_first_and_balanced(rule, counts, seed) -> None:
    """||b_i|| = ||a_i||, the largest first: what a client of rank r_k receives is the best part of its size."""
    if not rule.refactors or not rule.mixed_ranks or rule.name == "flora":
        pytest.skip("does not order its components")
    case = Round.random(rule, counts, seed)
    delta = case.aggregate().delta
    for layer in LAYERS:
        b, a = (case.adapter.tensors[n] + delta[n] for n in (f"{layer}.lora_B.weight", f"{layer}.lora_A.weight"))
        sizes = b.norm(dim=0)
        whole = sizes > 1e-6
        torch.testing.assert_close(sizes[whole], a.norm(dim=1)[whole], rtol=1e-6, atol=1e-6)
        assert bool((sizes.diff() <= 1e-6).all())


# --------------------------------------------------------------------------------------------------------- contract


def test_shares_what_it_trains_or_less(rule) -> None:
    for index in range(4):
        assert set(rule.shared(index)) <= set(rule.trained(index)) <= {"lora_A", "lora_B", "lora_R", "lora_v", "lora_a"}
    assert set(rule.trained(0)) != {"lora_A"}, "while B = 0, A has no gradient"


def test_starts_as_the_base(rule) -> None:
    """Whatever the first adapter is, it does nothing, and all that is trained from it has a gradient."""
    rng = np.random.default_rng(0)
    untrained = random_adapter(rng)
    zero = {name: tensor * 0 for name, tensor in untrained.only(["lora_B"]).items()}
    untrained = untrained.with_tensors({**untrained.tensors, **zero})
    adapter = rule.initial(untrained, lambda layer: normal(rng, *LAYERS[layer]), rng)
    assert not effect(adapter).any()
    assert set(untrained.tensors) <= set(adapter.tensors)
    step = {name: normal(rng, *tensor.shape) for name, tensor in adapter.only(rule.trained(0)).items()}
    assert effect(adapter, step).norm() > 0.1


def test_reads_the_updates_once_and_one_by_one(rule) -> None:
    """As a stream: when the next update is asked for, nothing of the one before may be needed."""
    case = Round.random(rule, [3, 1, 2], seed=0)
    expected = case.aggregate()
    asked = []

    def stream():
        for result in case.updates:
            asked.append(result.client)
            tensors = {name: tensor.clone() for name, tensor in result.update.tensors.items()}
            yield replace(result, update=result.update.with_tensors(tensors))
            for tensor in tensors.values():
                tensor.fill_(float("nan"))

    got = case.aggregate(stream())
    assert asked == ["0", "1", "2"]
    assert all(torch.equal(got.delta[name], expected.delta[name]) for name in expected.delta)
    assert torch.equal(beside(got.side_step), beside(expected.side_step))


def test_returns_steps_in_float64_and_changes_nothing(rule) -> None:
    case = Round.random(rule, [3, 1], seed=0)
    before = [{n: t.clone() for n, t in a.tensors.items()} for a in (case.adapter, *(u.update for u in case.updates))]
    result = case.aggregate()
    shapes = {n: t.shape for n, t in case.adapter.tensors.items()}
    assert all(step.shape == shapes[name] for name, step in result.delta.items())
    assert {factor_of(name) for name in result.delta} >= set(rule.shared(0))
    assert {step.dtype for step in result.delta.values()} == {torch.float64}
    assert bool(result.side_step) == rule.keeps_side
    after = [case.adapter, *(result.update for result in case.updates)]
    assert all(torch.equal(old[n], new.tensors[n]) for old, new in zip(before, after, strict=True) for n in old)


def test_adds_in_float64(rule) -> None:
    """Two clients far apart that cancel: float32 sums would keep seven digits of the large part, not of the small."""
    if rule.refactors or rule.rotation_invariant or rule_weighting(rule) == "norm" or rule.name == "lora-fair":
        pytest.skip("the products of such factors do not cancel")
    if rule.robust:
        pytest.skip("does not add")
    case = Round.random(rule, [1, 1, 1], seed=0)
    sent = case.updates[0].update.tensors
    large = {name: torch.full_like(tensor, 2.0**24) for name, tensor in sent.items()}
    small = {name: torch.ones_like(tensor) for name, tensor in sent.items()}
    steps = [large, small, {name: -tensor for name, tensor in large.items()}]
    updates = [
        replace(result, update=result.update.with_tensors(step))
        for result, step in zip(case.updates, steps, strict=True)
    ]
    delta = case.aggregate(iter(updates)).delta
    assert all(torch.allclose(step, torch.full_like(step, 1 / 3), rtol=1e-12) for step in delta.values())


def test_the_same_twice_gives_the_same_bits(rule) -> None:
    case = Round.random(rule, [3, 1, 2], seed=5)
    first, second = (case.aggregate() for _ in range(2))
    assert all(torch.equal(first.delta[name], second.delta[name]) for name in first.delta)
    assert torch.equal(beside(first.side_step), beside(second.side_step))
    assert first.metrics == second.metrics


def test_serialises_and_loads_back(rule) -> None:
    assert Aggregation.resolve(rule.model_dump(mode="json")) == rule


@given(counts=COUNTS, seed=SEEDS, split=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_one_update_stands_for_many_where_sums_suffice(
    rule: Aggregation, counts: list[int], seed: int, split: int
) -> None:
    """Two sites that send the means of their clients do what all clients do one by one."""
    if not rule.sums:
        pytest.skip("it needs each update")
    case = Round.random(rule, counts, seed)
    sites = []
    for part in (case.updates[:split], case.updates[split:]):
        merged = Merged(rule_weighting(rule))
        for result in part:
            merged.add(result)
        if (one := merged.result([one.client for one in reversed(part)])) is not None:
            sites.append(one)
    for one, part in zip(sites, (case.updates[:split], case.updates[split:]), strict=False):
        assert [one.client, *one.others] == [each.client for each in reversed(part)], "in the order that is asked for"
    assert sum(one.num_examples for one in sites) == sum(one.num_examples for one in case.updates)
    whole, merged_delta = case.aggregate().delta, case.but(sites).aggregate().delta
    for name, tensor in whole.items():
        torch.testing.assert_close(merged_delta[name], tensor, rtol=1e-5, atol=1e-5)


def test_who_needs_each_update_says_so() -> None:
    """What does more than average factors is not among those that sums suffice for."""
    able = {name for name, plugin in plugins("aggregation").items() if getattr(plugin, "sums", False)}
    assert able == {
        "fedit", "ffa-lora", "rolora", "lora-a2", "fedsa-lora", "fedsvd", "fed-sb", "tinylora", "fedkseed"
    }  # fmt: skip
