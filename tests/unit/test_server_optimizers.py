"""Server optimizers: recursions by hand."""

from __future__ import annotations

import pytest
import torch

from fedit.aggregation import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedYogi, Nesterov
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, ConfigError, ServerOptimizer

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


def follow(optimizer: ServerOptimizer, *deltas: float) -> list[float]:
    """Return where the first value goes, starting at 1."""
    adapter, state, path = START, {}, []
    for delta in deltas:
        adapter, state = optimizer.apply(adapter, step(delta, 0), state)
        path.append(adapter.tensors[NAME][0, 0].item())
    return path


def test_nesterov_by_hand() -> None:
    """momentum 0.5, rate 2: v = 4, 3, 1.5; steps 2 (D + v / 2) = 12, 5, 1.5."""
    assert follow(Nesterov(momentum=0.5, learning_rate=2), 4, 1, 0) == [13, 18, 19.5]


def test_nesterov_equals_torchs_sgd() -> None:
    parameter = torch.nn.Parameter(torch.tensor(1.0, dtype=torch.float64))
    sgd = torch.optim.SGD([parameter], lr=0.7, momentum=0.9, nesterov=True)
    path = []
    for delta in (0.5, -1.0, 2.0):
        parameter.grad = torch.tensor(-delta, dtype=torch.float64)
        sgd.step()
        path.append(parameter.item())
    assert follow(Nesterov(), 0.5, -1, 2) == pytest.approx(path, rel=1e-6)


def test_fedadagrad_by_hand() -> None:
    """tau 1: v = 1 + 4 = 5, then 5 + 9 = 14; steps 2 / (sqrt(5) + 1), -3 / (sqrt(14) + 1)."""
    first = 1 + 2 / (5**0.5 + 1)
    expected = [first, first - 3 / (14**0.5 + 1)]
    assert follow(FedAdagrad(learning_rate=1, tau=1), 2, -3) == pytest.approx(expected, rel=1e-6)


def test_fedadam_takes_squares_of_the_aggregate_not_of_its_mean() -> None:
    """tau 1, betas 1/2: m = 1, -1; v = 2.5, 5.75."""
    first = 1 + 1 / (2.5**0.5 + 1)
    expected = [first, first - 1 / (5.75**0.5 + 1)]
    assert follow(FedAdam(learning_rate=1, tau=1, beta1=0.5, beta2=0.5), 2, -3) == pytest.approx(expected, rel=1e-6)


def test_fedyogi_by_hand() -> None:
    """tau 1, betas 1/2: v = 1 + 4 / 2 = 3, then, D^2 = 1 being smaller, 3 - 1 / 2 = 2.5."""
    first = 1 + 1 / (3**0.5 + 1)
    expected = [first, first + 1 / (2.5**0.5 + 1)]
    assert follow(FedYogi(learning_rate=1, tau=1, beta1=0.5, beta2=0.5), 2, 1) == pytest.approx(expected, rel=1e-6)


def test_a_step_of_one_factor_leaves_the_other_and_what_is_remembered_of_it() -> None:
    """Rules that train A and B in turn: the momentum of each waits for its own next round."""
    other = "layer.lora_B.weight"
    adapter = Adapter({**START.tensors, other: torch.ones(2, 1)}, 1, 1.0)
    for optimizer in (FedAvgM(), Nesterov(), FedAdam()):
        moved, state = optimizer.apply(adapter, step(1, 2), {})
        further, later = optimizer.apply(moved, {other: torch.ones(2, 1, dtype=torch.float64)}, state)
        assert torch.equal(moved.tensors[other], adapter.tensors[other])
        assert torch.equal(further.tensors[NAME], moved.tensors[NAME])
        assert state.items() <= later.items()
