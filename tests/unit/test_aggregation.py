"""FedIT and FlexLoRA on two tiny clients, numbers by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedit.aggregation import FedIT, FlexLoRA
from fedit.interfaces import Adapter, ClientUpdate, RoundError

A, B = "layer.lora_A.weight", "layer.lora_B.weight"


def adapter(a: list[list[float]], b: list[list[float]], lora_alpha: float = 2.0) -> Adapter:
    return Adapter({A: torch.tensor(a), B: torch.tensor(b)}, len(a), lora_alpha)


def answer(client: str, received: Adapter, tuned: Adapter, num_examples: int) -> ClientUpdate:
    update = {name: tuned.tensors[name] - received.tensors[name] for name in (A, B)}
    return ClientUpdate(client, received.with_tensors(update), num_examples, num_tokens=10, loss=1.0)


# Rank 1, s = 2, weights 1/4 and 3/4. Client 0: B A = [[1], [0]] [[1, 0]]. Client 1: B A = [[0], [2]] [[0, 1]].
START = adapter([[1.0, 1.0]], [[0.0], [0.0]])
TUNED = [adapter([[1.0, 0.0]], [[1.0], [0.0]]), adapter([[0.0, 1.0]], [[0.0], [2.0]])]
ANSWERS = [answer("0", START, TUNED[0], 10), answer("1", START, TUNED[1], 30)]


def test_fedit_averages_the_factors() -> None:
    result = FedIT().aggregate(START, iter(ANSWERS))
    assert (START.tensors[A] + result.delta[A]).tolist() == [[0.25, 0.75]]
    assert (START.tensors[B] + result.delta[B]).tolist() == [[0.25], [1.5]]


def test_fedit_reports_what_averaging_loses() -> None:
    """The mean of s B A is diag(0.5, 3), kept is s [[0.25], [1.5]] [[0.25, 0.75]] = [[0.125, 0.375], [0.75, 2.25]]."""
    loss = FedIT().aggregate(START, iter(ANSWERS)).metrics["aggregation_loss"]
    lost = math.sqrt((0.5 - 0.125) ** 2 + 0.375**2 + 0.75**2 + (3 - 2.25) ** 2)
    assert loss == pytest.approx(lost / math.sqrt(0.5**2 + 3**2), rel=1e-12)


def test_flexlora_keeps_the_largest_component_of_the_mean_product() -> None:
    """diag(0.5, 3) / s cut to rank 1 is diag(0, 1.5), split evenly: |b| = |a| = sqrt(1.5). Lost: 0.5 of the norm."""
    result = FlexLoRA().aggregate(START, iter(ANSWERS))
    a, b = START.tensors[A] + result.delta[A], START.tensors[B] + result.delta[B]
    assert torch.allclose(b @ a, torch.tensor([[0.0, 0.0], [0.0, 1.5]], dtype=torch.float64), atol=1e-12)
    assert b.norm().item() == pytest.approx(math.sqrt(1.5), rel=1e-12)
    assert a.norm().item() == pytest.approx(math.sqrt(1.5), rel=1e-12)
    assert result.metrics["aggregation_loss"] == pytest.approx(0.5 / math.sqrt(0.5**2 + 3**2), rel=1e-12)


@pytest.mark.parametrize("rule", [FedIT, FlexLoRA])
def test_uniform_weights_ignore_the_number_of_rows(rule) -> None:
    equal = [answer(result.client, START, tuned, 1) for result, tuned in zip(ANSWERS, TUNED, strict=True)]
    uneven = rule(weighting="uniform").aggregate(START, iter(ANSWERS))
    expected = rule(weighting="examples").aggregate(START, iter(equal))
    assert all(torch.equal(uneven.delta[name], expected.delta[name]) for name in (A, B))
    assert uneven.metrics == expected.metrics


def test_flexlora_weighs_ranks_by_their_own_scaling() -> None:
    """alpha 2: a client of rank 1 works at s = 2, one of rank 2 at s = 1, whatever the global adapter's s is."""
    start = Adapter({A: torch.zeros(2, 2), B: torch.zeros(2, 2)}, 2, 2.0)
    low = answer("0", start.cut(1), adapter([[1.0, 0.0]], [[3.0], [0.0]]), 1)  # 2 * [[3, 0], [0, 0]]
    high = answer("1", start, adapter([[1.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 4.0]]), 1)  # 1 * [[0, 0], [0, 4]]
    result = FlexLoRA().aggregate(start, iter([low, high]))
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
        rule().aggregate(START, iter([answer("0", START, TUNED[0], 0)]))
