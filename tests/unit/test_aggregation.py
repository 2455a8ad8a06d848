"""Rules and weights on two tiny clients, numbers by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from fedit.aggregation import (
    FedExLoRA,
    FedIT,
    FedITPlus,
    FedMomentum,
    FedSVD,
    FlexLoRA,
    FLoRA,
    HetLoRA,
    LoRAFAIR,
    RaFLoRA,
    combine,
)
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, ClientUpdate, ConfigError, RoundError
from fedit.lowrank import LowRank

load_plugins()

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
RNG = np.random.default_rng(0)


def adapter(a: list[list[float]], b: list[list[float]], lora_alpha: float = 2.0) -> Adapter:
    return Adapter({A: torch.tensor(a), B: torch.tensor(b)}, len(a), lora_alpha)


def answer(client: str, received: Adapter, tuned: Adapter, num_examples: int) -> ClientUpdate:
    update = {name: tuned.tensors[name] - received.tensors[name] for name in (A, B)}
    return ClientUpdate(client, received.with_tensors(update), num_examples, num_tokens=10, loss=1.0, num_steps=1)


# Rank 1, s = 2, weights 1/4 and 3/4. Client 0: B A = [[1], [0]] [[1, 0]]. Client 1: B A = [[0], [2]] [[0, 1]].
START = adapter([[1.0, 1.0]], [[0.0], [0.0]])
TUNED = [adapter([[1.0, 0.0]], [[1.0], [0.0]]), adapter([[0.0, 1.0]], [[0.0], [2.0]])]
ANSWERS = [answer("0", START, TUNED[0], 10), answer("1", START, TUNED[1], 30)]


def test_fedit_averages_the_factors() -> None:
    result = FedIT().aggregate(START, iter(ANSWERS), RNG)
    assert (START.tensors[A] + result.delta[A]).tolist() == [[0.25, 0.75]]
    assert (START.tensors[B] + result.delta[B]).tolist() == [[0.25], [1.5]]


def test_fedit_reports_what_averaging_loses() -> None:
    """The mean of s B A is diag(0.5, 3), kept is s [[0.25], [1.5]] [[0.25, 0.75]] = [[0.125, 0.375], [0.75, 2.25]]."""
    loss = FedIT().aggregate(START, iter(ANSWERS), RNG).metrics["aggregation_loss"]
    lost = math.sqrt((0.5 - 0.125) ** 2 + 0.375**2 + 0.75**2 + (3 - 2.25) ** 2)
    assert loss == pytest.approx(lost / math.sqrt(0.5**2 + 3**2), rel=1e-12)


def test_flexlora_keeps_the_largest_component_of_the_mean_product() -> None:
    """diag(0.5, 3) / s cut to rank 1 is diag(0, 1.5), split evenly: |b| = |a| = sqrt(1.5). Lost: 0.5 of the norm."""
    result = FlexLoRA().aggregate(START, iter(ANSWERS), RNG)
    a, b = START.tensors[A] + result.delta[A], START.tensors[B] + result.delta[B]
    assert torch.allclose(b @ a, torch.tensor([[0.0, 0.0], [0.0, 1.5]], dtype=torch.float64), atol=1e-12)
    assert b.norm().item() == pytest.approx(math.sqrt(1.5), rel=1e-12)
    assert a.norm().item() == pytest.approx(math.sqrt(1.5), rel=1e-12)
    assert result.metrics["aggregation_loss"] == pytest.approx(0.5 / math.sqrt(0.5**2 + 3**2), rel=1e-12)


@pytest.mark.parametrize("rule", [FedIT, FlexLoRA])
def test_uniform_weights_ignore_the_number_of_rows(rule) -> None:
    equal = [answer(result.client, START, tuned, 1) for result, tuned in zip(ANSWERS, TUNED, strict=True)]
    uneven = rule(weighting="uniform").aggregate(START, iter(ANSWERS), RNG)
    expected = rule(weighting="examples").aggregate(START, iter(equal), RNG)
    assert all(torch.equal(uneven.delta[name], expected.delta[name]) for name in (A, B))
    assert uneven.metrics == expected.metrics


def test_flexlora_weighs_ranks_by_their_own_scaling() -> None:
    """alpha 2: a client of rank 1 works at s = 2, one of rank 2 at s = 1, whatever the global adapter's s is."""
    start = Adapter({A: torch.zeros(2, 2), B: torch.zeros(2, 2)}, 2, 2.0)
    low = answer("0", start.cut(1), adapter([[1.0, 0.0]], [[3.0], [0.0]]), 1)  # 2 * [[3, 0], [0, 0]]
    high = answer("1", start, adapter([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]), 1)  # 1 * [[0, 0], [0, 4]]
    result = FlexLoRA().aggregate(start, iter([low, high]), RNG)
    kept = (start.tensors[B] + result.delta[B]) @ (start.tensors[A] + result.delta[A]) * start.scaling
    assert torch.allclose(kept, torch.tensor([[3.0, 0.0], [0.0, 2.0]], dtype=torch.float64), atol=1e-12)


def test_a_cut_adapter_does_what_its_first_components_do() -> None:
    """alpha 2, rank 2 -> 1: s doubles, so the product of the factors is halved."""
    whole = adapter([[1.0, 2.0], [3.0, 4.0]], [[1.0, 5.0], [2.0, 6.0]])
    cut = whole.cut(1)
    assert (cut.rank, cut.lora_alpha, cut.scaling) == (1, 2.0, 2.0)
    assert torch.allclose(cut.tensors[B] @ cut.tensors[A] * cut.scaling, torch.tensor([[1.0, 2.0], [2.0, 4.0]]))
    assert torch.allclose(cut.tensors[A].norm() / cut.tensors[B].norm(), torch.tensor(1.0))
    assert whole.cut(2) is whole


@pytest.mark.parametrize("rule", [FedIT, FlexLoRA])
def test_nobody_has_a_weight(rule) -> None:
    with pytest.raises(RoundError, match="positive weight"):
        rule().aggregate(START, iter([answer("0", START, TUNED[0], 0)]), RNG)


# ------------------------------------------------------------------------------------------------- weights and rules


def test_weights_by_tokens() -> None:
    """1 and 3 times the tokens, as many rows: the quarters of START's example."""
    answers = [
        replace(result, num_examples=1, num_tokens=count) for result, count in zip(ANSWERS, (5, 15), strict=True)
    ]
    expected = FedIT().aggregate(START, iter(ANSWERS), RNG)
    result = FedIT(weighting="tokens").aggregate(START, iter(answers), RNG)
    assert all(torch.equal(result.delta[name], expected.delta[name]) for name in (A, B))


def test_fednova_counts_a_step_as_a_step() -> None:
    """Rows 1 : 1, steps 1 and 3: both updates are divided by their steps and multiplied by the mean, 2."""
    answers = [replace(result, num_examples=1, num_steps=steps) for result, steps in zip(ANSWERS, (1, 3), strict=True)]
    result = FedIT(weighting="fednova").aggregate(START, iter(answers), RNG)
    first, second = (each.update.tensors for each in ANSWERS)
    for name in (A, B):
        expected = 2 * (0.5 * first[name].double() / 1 + 0.5 * second[name].double() / 3)
        assert torch.allclose(result.delta[name], expected, rtol=1e-12)


@pytest.mark.parametrize("rule", [FedIT, FlexLoRA, FLoRA])
def test_fednova_of_equal_steps_is_the_mean(rule) -> None:
    answers = [replace(result, num_steps=7) for result in ANSWERS]
    result = rule(weighting="fednova").aggregate(START, iter(answers), np.random.default_rng(1))
    expected = rule().aggregate(START, iter(answers), np.random.default_rng(1))
    assert all(torch.allclose(result.delta[name], expected.delta[name], atol=1e-12) for name in (A, B))
    assert result.metrics["aggregation_loss"] == pytest.approx(expected.metrics["aggregation_loss"], abs=1e-12)


def test_hetlora_weighs_by_the_size_of_the_product() -> None:
    """||s B A|| is 2 and 4: weights 1/3 and 2/3."""
    result = HetLoRA().aggregate(START, iter(ANSWERS), RNG)
    assert torch.allclose(START.tensors[A] + result.delta[A], torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64))
    assert torch.allclose(START.tensors[B] + result.delta[B], torch.tensor([[1 / 3], [4 / 3]], dtype=torch.float64))


def test_flora_stacks_and_starts_again() -> None:
    """Beside the base: the mean of s B A, diag(0.5, 3), of rank 2; B is zero, A new and within 1/sqrt(2)."""
    result = FLoRA().aggregate(START, iter(ANSWERS), np.random.default_rng(3))
    assert torch.allclose(result.side_step["layer"].dense(), torch.tensor([[0.5, 0.0], [0.0, 3.0]]).double())
    a = START.tensors[A] + result.delta[A]
    assert (START.tensors[B] + result.delta[B]).tolist() == [[0.0], [0.0]]
    assert 0 < float(a.abs().max()) <= 0.5**0.5
    again = FLoRA().aggregate(START, iter(ANSWERS), np.random.default_rng(4))
    assert not torch.equal(again.delta[A], result.delta[A])


def test_fedex_leaves_the_covariance_beside() -> None:
    """diag(0.5, 3) - s B A of the means, and of rank K - 1 = 1."""
    result = FedExLoRA().aggregate(START, iter(ANSWERS), RNG)
    expected = torch.tensor([[0.5 - 0.125, -0.375], [-0.75, 3 - 2.25]], dtype=torch.float64)
    assert torch.allclose(result.side_step["layer"].dense(), expected, atol=1e-12)
    assert result.side_step["layer"].rank == 1
    assert torch.equal(result.delta[A], FedIT().aggregate(START, iter(ANSWERS), RNG).delta[A])


def test_fedmomentum_leaves_the_smaller_components_beside() -> None:
    result = FedMomentum().aggregate(START, iter(ANSWERS), RNG)
    assert torch.allclose(result.side_step["layer"].dense(), torch.tensor([[0.5, 0.0], [0.0, 0.0]]).double())


@pytest.mark.parametrize(("energy", "rank"), [(1.0, 1), (0.98, 1), (0.97, 0)])
def test_fedit_plus_keeps_beside_what_matters(energy: float, rank: int) -> None:
    """The largest component has 9 / 9.25 = 97.3% of the energy."""
    result = FedITPlus(energy=energy).aggregate(START, iter(ANSWERS), RNG)
    assert result.side_step["layer"].rank == rank
    assert result.metrics["aggregation_loss"] == pytest.approx((1 - rank) * 0.5 / math.sqrt(9.25), abs=1e-12)


def test_fedit_plus_takes_up_again_what_lay_beside() -> None:
    """side = diag(5, 0) is larger than what the clients learned, diag(0.5, 3): it is what is trained next."""
    side = {"layer": LowRank(torch.tensor([[5.0], [0.0]]), torch.tensor([[1.0, 0.0]]))}
    result = FedITPlus(energy=1.0).aggregate(replace(START, side=side), iter(ANSWERS), RNG)
    kept = 2 * (START.tensors[B] + result.delta[B]) @ (START.tensors[A] + result.delta[A])
    assert torch.allclose(kept, torch.tensor([[5.5, 0.0], [0.0, 0.0]]).double(), atol=1e-12)
    assert torch.allclose(result.side_step["layer"].dense(), torch.tensor([[0.0, 0.0], [0.0, 3.0]]).double())
    assert result.replaces_side


def test_fedsvd_turns_a_to_orthonormal_rows() -> None:
    start = adapter([[2.0, 0.0], [1.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
    sent = ClientUpdate("0", Adapter({B: torch.tensor([[1.0, 2.0], [0.0, 1.0]])}, 2, 2.0), 1, 1, 1.0, 1)
    result = FedSVD().aggregate(start, iter([sent]), RNG)
    a, b = start.tensors[A] + result.delta[A], start.tensors[B] + result.delta[B]
    assert torch.allclose(a @ a.T, torch.eye(2, dtype=torch.float64), atol=1e-12)
    expected = sent.update.tensors[B].double() @ start.tensors[A].double()
    assert torch.allclose(b @ a, expected, atol=1e-12)


def test_lora_fair_comes_closer_to_the_mean_product() -> None:
    """With A = [[0.25, 0.75]] fixed, the best B for diag(0.25, 1.5) is M A^T / (A A^T), up to the ridge."""
    result = LoRAFAIR(regularisation=1e-9).aggregate(START, iter(ANSWERS), RNG)
    a = torch.tensor([[0.25, 0.75]], dtype=torch.float64)
    expected = torch.tensor([[0.25 * 0.25], [1.5 * 0.75]], dtype=torch.float64) / (a @ a.T)
    assert torch.allclose(START.tensors[B] + result.delta[B], expected, atol=1e-7)
    plain = FedIT().aggregate(START, iter(ANSWERS), RNG).metrics["aggregation_loss"]
    assert result.metrics["aggregation_loss"] < plain


def test_raflora_averages_a_component_over_its_owners() -> None:
    """The second component is one client's alone: it is not halved, as FlexLoRA halves it."""
    start = Adapter({A: torch.zeros(2, 2), B: torch.zeros(2, 2)}, 2, 2.0)
    low = answer("0", start.cut(1), adapter([[1.0, 0.0]], [[3.0], [0.0]]), 1)  # 2 * [[3, 0], [0, 0]]
    high = answer("1", start, adapter([[0.0, 1.0], [1.0, 0.0]], [[0.0, 4.0], [2.0, 0.0]]), 1)
    result = RaFLoRA().aggregate(start, iter([low, high]), RNG)
    kept = (start.tensors[B] + result.delta[B]) @ (start.tensors[A] + result.delta[A])
    # First: the mean of [[6, 0], [0, 0]] and [[0, 0], [0, 2]]; second: [[4, 0], [0, 0]] whole.
    assert torch.allclose(kept, torch.tensor([[3.0 + 4.0, 0.0], [0.0, 1.0]]).double(), atol=1e-12)
    assert result.metrics["aggregation_loss"] > 0.1


def test_a_rule_that_leaves_something_beside_needs_whole_steps() -> None:
    for optimizer in ({"name": "fedavg", "learning_rate": 2}, "fedadam"):
        with pytest.raises(ConfigError, match="leaves the rest of each step beside the adapter"):
            parse_config({"aggregation": "fedex-lora", "server_optimizer": optimizer})
    parse_config({"aggregation": "fedex-lora", "server_optimizer": "fedavg"})


@pytest.mark.parametrize("num_clients", [3, 30, 90])
def test_what_is_lost_is_measured_in_bounded_memory(num_clients: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly with few clients; with many, by sketches, to a few percent of itself, and the means are the same."""
    rng = np.random.default_rng(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.normal(size=shape)).float()

    shapes = {"A": (4, 250), "B": (300, 4)}
    tensors = {f"{layer}.lora_{f}.weight": draw(*shape) for layer in range(9) for f, shape in shapes.items()}
    received = Adapter(tensors, 4, 8.0)
    steps = [{name: draw(*t.shape) for name, t in received.tensors.items()} for _ in range(num_clients)]
    answers = [ClientUpdate(str(k), received.with_tensors(step), 1 + k % 3, 1, 1.0, 1) for k, step in enumerate(steps)]
    measured = FedIT().aggregate(received, iter(answers), RNG)
    monkeypatch.setattr(combine, "EXACT_RANK", 10**6)
    exact = FedIT().aggregate(received, iter(answers), RNG)
    assert all(torch.equal(measured.delta[name], exact.delta[name]) for name in exact.delta)
    expected = exact.metrics["aggregation_loss"]
    assert measured.metrics["aggregation_loss"] == pytest.approx(expected, rel=1e-12 if num_clients <= 48 else 0.03)
    assert (measured.metrics["aggregation_loss"] == expected) == (num_clients <= 48)


@pytest.mark.parametrize("name", ["fed-sb", "tinylora"])
def test_rules_that_start_from_the_weights_need_them(name: str) -> None:
    with pytest.raises(ConfigError, match="starts from the singular vectors of the base's weights"):
        parse_config({"model": {"quantization": "nf4"}, "aggregation": name})


def test_hetlora_leaves_a_component_that_nobody_has_able_to_grow() -> None:
    """A cohort of low ranks: the last component does nothing, and keeps its row of A."""
    rng = np.random.default_rng(0)
    a, b = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((4, 6), (5, 4)))
    received = Adapter({A: a, B: b}, 4, 8.0)
    sent = received.cut(2)
    step = {name: torch.ones_like(tensor) for name, tensor in sent.tensors.items()}
    answers = [ClientUpdate("0", sent.with_tensors(step), 1, 1, 1.0, 1)]
    delta = HetLoRA().aggregate(received, iter(answers), RNG).delta
    assert torch.allclose((received.tensors[A] + delta[A])[2:], received.tensors[A][2:].double())
    assert torch.allclose((received.tensors[B] + delta[B])[:, 2:], torch.zeros(5, 2).double(), atol=1e-6)


@pytest.mark.parametrize("rule", [FLoRA(), FedExLoRA()])
def test_exact_rules_stay_exact_at_ranks_where_nothing_is_decomposed(rule: FLoRA | FedExLoRA) -> None:
    """200 clients of rank 4: 800 components, measured by a sketch; the kept and the side are the dense mean."""
    rng = np.random.default_rng(3)
    a, b = (torch.from_numpy(rng.normal(size=shape)).float() for shape in ((4, 830), (820, 4)))
    received = Adapter({A: a, B: b}, 4, 8.0)
    steps = [{name: torch.from_numpy(rng.normal(size=tuple(t.shape))).float() for name, t in received.tensors.items()}
             for _ in range(200)]  # fmt: skip
    answers = [ClientUpdate(str(k), received.with_tensors(step), 1, 1, 1.0, 1) for k, step in enumerate(steps)]
    result = rule.aggregate(received, iter(answers), RNG)
    assert result.metrics["aggregation_loss"] < 1e-10
    tuned = [(b.double() + step[B].double(), a.double() + step[A].double()) for step in steps]
    dense = 2.0 / 200 * torch.cat([each for each, _ in tuned], dim=1) @ torch.cat([each for _, each in tuned])
    kept = 2.0 * (b.double() + result.delta[B]) @ (a.double() + result.delta[A]) + result.side_step["layer"].dense()
    torch.testing.assert_close(kept, dense, rtol=1e-8, atol=1e-8)


def test_what_the_server_returns_is_what_changed() -> None:
    assert set(FLoRA().returned(0)) == set(), "the fresh adapter is drawn from the seed"
    assert set(FedSVD().returned(0)) == {"lora_A", "lora_B"}


def test_fedkseed_moves_one_number_in_a_step() -> None:
    with pytest.raises(ConfigError, match="moves one number of many in a step"):
        parse_config({"aggregation": "fedkseed"})
    parse_config({"aggregation": "fedkseed", "client": {"local_steps": 1, "optimizer": "sgd"}})


def test_weights_that_are_not_quantised_will_do() -> None:
    parse_config({"aggregation": "fed-sb"})
