"""What every registered server optimizer must satisfy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fedit.checkpoints import load_state, save_state
from fedit.config import load_plugins, parse_config
from fedit.interfaces import Adapter, ConfigError, ServerOptimizer, plugins
from fedit.server import ServerState

load_plugins()

SHAPES = {"layer.lora_A.weight": (2, 5), "layer.lora_B.weight": (3, 2)}


@pytest.fixture(scope="module", params=plugins("server_optimizer"))
def optimizer(request: pytest.FixtureRequest) -> ServerOptimizer:
    return plugins("server_optimizer")[request.param]()  # type: ignore[return-value]


@pytest.fixture
def adapter() -> Adapter:
    tensors = {name: tensor.float() for name, tensor in random_delta(0).items()}
    return Adapter(tensors, 2, 4.0)


def random_delta(seed: int) -> dict[str, Tensor]:
    rng = np.random.default_rng(seed)
    return {name: torch.from_numpy(rng.normal(size=shape)) for name, shape in SHAPES.items()}


def copied(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def same_bits(left: Mapping[str, Tensor], right: Mapping[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def test_a_first_step_of_zero_moves_nothing(optimizer, adapter) -> None:
    zero = {name: torch.zeros(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    moved, _ = optimizer.apply(adapter, zero, {})
    assert same_bits(moved.tensors, adapter.tensors)


def test_a_step_goes_the_way_of_the_aggregate(optimizer, adapter) -> None:
    delta = random_delta(1)
    moved, _ = optimizer.apply(adapter, delta, {})
    assert sum(((moved.tensors[n].double() - adapter.tensors[n].double()) * delta[n]).sum() for n in SHAPES) > 0


def test_the_adapter_keeps_its_shape_and_precision(optimizer, adapter) -> None:
    state: Mapping[str, Tensor] = {}
    moved = adapter
    for seed in range(3):
        moved, state = optimizer.apply(moved, random_delta(seed), state)
    assert {name: (t.shape, t.dtype) for name, t in moved.tensors.items()} == {
        name: (t.shape, t.dtype) for name, t in adapter.tensors.items()
    }
    assert (moved.rank, moved.lora_alpha) == (adapter.rank, adapter.lora_alpha)


def test_what_is_given_is_left_alone(optimizer, adapter) -> None:
    _, state = optimizer.apply(adapter, random_delta(1), {})
    given = (adapter.tensors, random_delta(2), state)
    before = [copied(tensors) for tensors in given]
    optimizer.apply(adapter, given[1], state)
    assert all(same_bits(now, then) for now, then in zip(given, before, strict=True))


def test_a_saved_state_goes_on_with_the_same_bits(optimizer, adapter, tmp_path: Path) -> None:
    moved, state = optimizer.apply(adapter, random_delta(1), {})
    save_state(ServerState(1, moved, state), tmp_path)
    loaded = load_state(tmp_path)
    assert loaded is not None
    expected, expected_state = optimizer.apply(moved, random_delta(2), state)
    resumed, resumed_state = optimizer.apply(loaded.adapter, random_delta(2), loaded.optimizer_state)
    assert same_bits(resumed.tensors, expected.tensors)
    assert same_bits(resumed_state, expected_state)


def test_one_that_remembers_refuses_a_change_of_basis(optimizer, adapter) -> None:
    """What was remembered refers to factors that a refactoring aggregation turns into others."""
    _, state = optimizer.apply(adapter, random_delta(1), {})
    refactoring = [name for name, rule in plugins("aggregation").items() if getattr(rule, "refactors", False)]
    assert refactoring
    for name in refactoring:
        tables = {"aggregation": name, "server_optimizer": optimizer.name}
        if state:
            with pytest.raises(ConfigError, match="basis"):
                parse_config(tables)
        else:
            parse_config(tables)


def test_serialises_and_loads_back(optimizer) -> None:
    assert ServerOptimizer.resolve(optimizer.model_dump(mode="json")) == optimizer
