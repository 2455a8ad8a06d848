"""Robust rules by hand-computed numbers, and against attackers."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fedit.aggregation import RFA, Krum, Median, MultiKrum, NormClipping, TrimmedMean
from fedit.aggregation.robust import squared_distances
from fedit.attacks import GaugeRescaling, Gaussian, Scaling, SignFlip
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, Aggregation, Attack, ClientUpdate, ConfigError

load_plugins()

SHAPES = {
    "q.lora_A.weight": (2, 6),
    "q.lora_B.weight": (5, 2),
    "v.lora_A.weight": (2, 4),
    "v.lora_B.weight": (7, 2),
}
ROBUST = [Median(), TrimmedMean(malicious=0.3), Krum(malicious=0.3), MultiKrum(malicious=0.3), RFA(), NormClipping()]


def draw(rng: np.random.Generator, scale: float = 1.0) -> dict[str, Tensor]:
    return {name: torch.from_numpy(scale * rng.normal(size=shape)).float() for name, shape in SHAPES.items()}


def answers(adapter: Adapter, steps: Sequence[dict[str, Tensor]]) -> list[ClientUpdate]:
    made = (Adapter(step, adapter.rank, adapter.lora_alpha) for step in steps)
    return [ClientUpdate(str(k), update, 10, 100, 1.0, 5) for k, update in enumerate(made)]


def aggregate(rule: Aggregation, adapter: Adapter, steps: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    return dict(rule.aggregate(adapter, answers(adapter, steps), np.random.default_rng(0)).delta)


def numbers(*values: float) -> tuple[Adapter, list[dict[str, Tensor]]]:
    """One layer of one input and output with A = 1: the update moves B by the value."""
    adapter = Adapter({"q.lora_A.weight": torch.ones(1, 1), "q.lora_B.weight": torch.zeros(1, 1)}, 1, 1.0)
    steps = [{"q.lora_A.weight": torch.zeros(1, 1), "q.lora_B.weight": torch.full((1, 1), value)} for value in values]
    return adapter, steps


@pytest.mark.parametrize(
    ("rule", "values", "expected"),
    [
        (Median(), (1, 2, 100), 2),
        (Median(), (1, 2, 4, 100), 3),
        (TrimmedMean(malicious=0.2), (-50, 1, 2, 3, 100), 2),
        (TrimmedMean(malicious=0.0), (1, 2, 6), 3),
        # Krum, f = 1 of 5: two neighbours each; 2 has 1 and 3.
        (Krum(malicious=0.2), (1, 2, 3, 5, 100), 2),
        (Krum(malicious=0.4), (1, 2, 9), 1.5),  # f = 0 is all that three clients allow, one neighbour: a tie
        (MultiKrum(malicious=0.2), (1, 2, 3, 4, 100), 2.5),
        (RFA(iterations=100), (0, 0, 0, 10, 20), 0),
        (NormClipping(), (1, 2, 100), 5 / 3),
        (NormClipping(max_norm=1.5), (1, -2, 100), (1 - 1.5 + 1.5) / 3),
    ],
)
def test_by_hand(rule: Aggregation, values: tuple[float, ...], expected: float) -> None:
    delta = aggregate(rule, *numbers(*values))
    assert float(delta["q.lora_B.weight"]) == pytest.approx(expected, abs=1e-4)


def test_buckets_are_averaged_first() -> None:
    """Six clients in buckets of two: the median is of three means."""
    adapter, steps = numbers(1, 2, 4, 8, 16, 32)
    order = np.random.default_rng(0).permutation(6)
    values = np.array([1, 2, 4, 8, 16, 32])[order].reshape(3, 2).mean(axis=1)
    got = aggregate(Median(bucket_size=2), adapter, steps)["q.lora_B.weight"]
    assert float(got) == pytest.approx(np.median(values))


@settings(deadline=None)
@given(st.integers(0, 2**32), st.integers(2, 6))
def test_distances_are_those_of_the_dense_products_and_of_the_factors(seed: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    adapter, steps = Adapter(draw(rng), 2, 4.0), [draw(rng, 0.1) for _ in range(count)]
    does, written = [], []
    for step in steps:
        moved = {name: (tensor + step[name]).double() for name, tensor in adapter.tensors.items()}
        does.append(torch.cat([(moved[f"{m}.lora_B.weight"] @ moved[f"{m}.lora_A.weight"]).flatten() for m in "qv"]))
        written.append(torch.cat([tensor.flatten() for tensor in step.values()]).double())
    expected = torch.zeros(count, count, dtype=torch.float64)
    for points in (torch.stack(does), torch.stack(written)):
        squares = (points[:, None] - points[None]).square().sum(dim=2)
        others = [squares[i][torch.arange(count) != i].median() for i in range(count)]
        expected += squares / torch.stack(others).median()
    got = squared_distances(adapter, [{n: t.double() for n, t in step.items()} for step in steps])
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-8)


def test_rfa_finds_the_point_with_the_least_sum_of_distances() -> None:
    """In the space that the distances are of: no small move of the weights makes the sum smaller."""
    rng = np.random.default_rng(1)
    adapter, steps = Adapter(draw(rng), 2, 4.0), [draw(rng, 0.1) for _ in range(7)]
    squares = squared_distances(adapter, [{n: t.double() for n, t in step.items()} for step in steps])
    got = aggregate(RFA(iterations=200), adapter, steps)
    flat = torch.stack([torch.cat([t.flatten() for t in step.values()]).double() for step in steps])
    weights = torch.linalg.lstsq(flat.T, torch.cat([t.flatten() for t in got.values()])).solution
    assert float(weights.sum()) == pytest.approx(1)

    def total(weights: Tensor) -> float:
        return float((squares @ weights - weights @ squares @ weights / 2).clamp(min=0).sqrt().sum())

    for _ in range(50):
        other = (weights + torch.from_numpy(rng.normal(scale=0.02, size=7))).clamp(min=0)
        assert total(weights) <= total(other / other.sum()) + 1e-9


# ---------------------------------------------------------------------------------------------------------- attacks

ATTACKS = [Scaling(factor=100.0), SignFlip(factor=20.0), Gaussian(factor=50.0), GaugeRescaling(factor=50.0)]


def attacked(attack: Attack, num_malicious: int = 3) -> tuple[Adapter, list[dict[str, Tensor]], Tensor]:
    """Ten clients that learned about the same, some of them malicious; and the honest ones' mean."""
    rng = np.random.default_rng(3)
    adapter, common = Adapter(draw(rng), 2, 4.0), draw(rng, 0.1)
    steps = [{name: common[name] + step for name, step in draw(rng, 0.02).items()} for _ in range(10)]
    honest = torch.stack([torch.cat([t.flatten() for t in step.values()]) for step in steps[num_malicious:]]).mean(0)
    for index in range(num_malicious):
        steps[index] = dict(attack.tamper(adapter.tensors, steps[index], rng))
    return adapter, steps, honest.double()


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
@pytest.mark.parametrize("rule", ROBUST, ids=lambda rule: rule.name)
def test_three_of_ten_cannot_steer_it(rule: Aggregation, attack: Attack) -> None:
    """As far from the honest mean as an honest client, or a little farther; a mean is carried away."""
    adapter, steps, honest = attacked(attack)

    def error(rule: Aggregation) -> float:
        got = torch.cat([tensor.flatten() for tensor in aggregate(rule, adapter, steps).values()])
        return float((got - honest).norm() / honest.norm())

    bound = 0.8 if rule.name == "norm-clipping" else 0.3  # which bounds what each can do, and leaves it that
    assert error(rule) < bound
    assert error(Aggregation.resolve("fedit")) > 3 * bound


def test_a_gauge_rescaling_changes_factors_and_no_product() -> None:
    adapter, honest, _ = attacked(Scaling(factor=1.0))
    _, rescaled, _ = attacked(GaugeRescaling(factor=10.0))

    def tuned(step: dict[str, Tensor], name: str) -> Tensor:
        return adapter.tensors[name] + step[name]

    for index in range(3):
        for m in "qv":
            a, b = f"{m}.lora_A.weight", f"{m}.lora_B.weight"
            torch.testing.assert_close(tuned(rescaled[index], b), 10 * tuned(honest[index], b))
            product = tuned(rescaled[index], b) @ tuned(rescaled[index], a)
            torch.testing.assert_close(product, tuned(honest[index], b) @ tuned(honest[index], a), rtol=1e-4, atol=1e-5)


def test_attackers_are_drawn_from_the_seed_or_named() -> None:
    clients = [f"client{index}" for index in range(10)]
    drawn = SignFlip(clients=0.3).malicious(clients, 0)
    assert len(drawn) == 3
    assert drawn == SignFlip(clients=0.3).malicious(clients, 0)
    assert {tuple(SignFlip(clients=0.3).malicious(clients, seed)) for seed in range(9)} != {tuple(drawn)}
    assert SignFlip(clients=("client7", "client2")).malicious(clients, 0) == ["client2", "client7"]


def test_a_bad_client_spoils_its_bucket() -> None:
    """Two of ten in buckets of two are up to two of five, whatever the draw."""
    adapter, steps = numbers(100, -100, *(1.0 + 0.01 * k for k in range(8)))
    for seed in range(20):
        rule, rng = TrimmedMean(malicious=0.2, bucket_size=2), np.random.default_rng(seed)
        delta = rule.aggregate(adapter, answers(adapter, steps), rng).delta
        assert 0.9 < float(delta["q.lora_B.weight"]) < 1.2


@pytest.mark.parametrize(
    ("tables", "reason"),
    [
        ({"aggregation": {"name": "rfa", "bucket_size": 4}}, "leaves 2 buckets"),
        ({"aggregation": {"name": "norm-clipping", "max_norm": -1.0}}, "max_norm"),
        ({"attack": {}}, "expected a name"),
        ({"attack": {"name": "gauge-rescaling"}, "aggregation": "ffa-lora"}, "takes lora_B only"),
        ({"attack": "backdoor", "evaluation": {"max_new_tokens": 0}}, "judged by generated answers"),
    ],
)
def test_what_cannot_be_is_refused(tables: dict[str, object], reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        parse_config({"partition": {"name": "iid", "num_clients": 8}, **tables})


def test_a_share_of_nobody_is_refused() -> None:
    with pytest.raises(ConfigError, match="is nobody"):
        SignFlip(clients=0.2).malicious(["a", "b"], 0)


@pytest.mark.parametrize("partition", ["natural", {"name": "iid", "num_clients": 9}])
def test_enough_buckets_or_an_unknown_number_of_them(partition: object) -> None:
    parse_config({"partition": partition, "aggregation": {"name": "rfa", "bucket_size": 3}})
