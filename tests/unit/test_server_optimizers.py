"""FedAvg and FedAvgM: recursions by hand."""

from __future__ import annotations

import pytest
import torch

from fedit.aggregation import FedAvg, FedAvgM
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, ConfigError

load_plugins()

NAME = "layer.lora_A.weight"
START = Adapter({NAME: torch.tensor([[1.0, -2.0]])}, 1, 1.0)


def step(*values: float) -> dict[str, torch.Tensor]:
    return {NAME: torch.tensor([values], dtype=torch.float64)}


def test_fedavg_adds_the_aggregate() -> None:
    moved, state = FedAvg().apply(START, step(0.5, 4), {})
    assert moved.tensors[NAME].tolist() == [[1.5, 2.0]]
    assert state == {}
    further, _ = FedAvg(learning_rate=3.0).apply(START, step(0.5, 4), {})
    assert further.tensors[NAME].tolist() == [[2.5, 10.0]]


def test_fedavgm_by_hand() -> None:
    """momentum 0.5, rate 2: v = 4, then 0.5 * 4 + 1 = 3, then 0.5 * 3 + 0 = 1.5; theta = 1 + 2 (4, 3, 1.5) in turn."""
    optimizer = FedAvgM(momentum=0.5, learning_rate=2.0)
    adapter, state, path = START, {}, []
    for delta in (4.0, 1.0, 0.0):
        adapter, state = optimizer.apply(adapter, step(delta, 0), state)
        path.append((state[NAME][0, 0].item(), adapter.tensors[NAME][0, 0].item()))
    assert path == [(4.0, 9.0), (3.0, 15.0), (1.5, 18.0)]
    assert adapter.tensors[NAME][0, 1].item() == -2.0


def test_fedavgm_steps_grow_to_one_over_one_minus_momentum() -> None:
    optimizer, adapter, before, state = FedAvgM(momentum=0.9), START, START, {}
    for _ in range(200):
        before = adapter
        adapter, state = optimizer.apply(adapter, step(1, 0), state)
    assert (adapter.tensors[NAME] - before.tensors[NAME])[0, 0].item() == pytest.approx(10, rel=1e-4)


def test_velocity_is_kept_in_float64() -> None:
    _, state = FedAvgM(momentum=0.5).apply(START, step(1, 0), {NAME: torch.tensor([[1e-12, 0]], dtype=torch.float64)})
    assert state[NAME].dtype == torch.float64
    assert state[NAME][0, 0].item() == 1 + 5e-13


def test_fedavgm_refuses_a_rule_that_changes_the_basis() -> None:
    with pytest.raises(ConfigError, match=r"'flexlora' changes the basis.*Use fedavg"):
        parse_config({"aggregation": "flexlora", "server_optimizer": "fedavgm"})
    parse_config({"aggregation": "fedit", "server_optimizer": "fedavgm"})
    parse_config({"aggregation": "flexlora", "server_optimizer": "fedavg"})


@pytest.mark.parametrize("parameters", [{"momentum": 1.0}, {"momentum": -0.1}, {"learning_rate": 0.0}])
def test_rates_without_a_meaning_are_refused(parameters: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"\[server_optimizer\] fedavgm: " + next(iter(parameters))):
        parse_config({"server_optimizer": {"name": "fedavgm", **parameters}})
