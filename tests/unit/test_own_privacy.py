"""Privacy that clients give themselves: what it costs, who runs out of it, and what leaves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from plain_tuning import load, make_examples
from torch import Tensor

from fedit.accounting import noise_for, spent_epsilon
from fedit.config import AdapterConfig, RunConfig, load_plugins, parse_config
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.interfaces import ClientFailure, ClientUpdate, ConfigError, derive_rng
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy
from fedit.privacy import Draws
from fedit.server import RoundRecord, ServerState, train

load_plugins()


def config(privacy: dict[str, Any], **tables: Any) -> RunConfig:
    return parse_config({
        "privacy": privacy,
        "rounds": 3,
        "adapter": {"rank": 4, "alpha": 8},
        "client": {"local_steps": 2, "batch_size": 4},
        "aggregation": {"name": "fedit", "weighting": "uniform"},
        **tables,
    })  # fmt: skip


BY_ROW = {"mechanism": "dp-sgd", "noise_multiplier": 1.0, "clip_norm": 0.1}
LOCAL = {"mechanism": "local", "noise_multiplier": 4.0, "clip_norm": 0.1, "delta": 1e-3}


def own(run: RunConfig, num_examples: int) -> OwnPrivacy:
    made = OwnPrivacy.of(run, num_examples)
    assert made is not None
    return made


# ------------------------------------------------------------------------------------------------- what it costs


@pytest.mark.parametrize(("noise", "share", "steps"), [(1.0, 0.05, 300), (0.7, 0.2, 40), (2.0, 1.0, 10)])
def test_the_bound_is_that_of_opacus(noise: float, share: float, steps: int) -> None:
    other = RDPAccountant()
    other.history = [(noise, share, steps)]
    ours = spent_epsilon(noise, share, steps, 1e-4, tight=False)
    assert ours == pytest.approx(other.get_epsilon(delta=1e-4), rel=0.02)
    assert ours >= spent_epsilon(noise, share, steps, 1e-4)


def test_a_client_spends_by_its_rows_steps_and_tunings() -> None:
    made = own(config(BY_ROW), 50)
    assert (made.share, made.steps_per_tuning, made.num_expected) == (0.08, 2, 4)
    assert made.delta == 50**-1.1
    assert made.spent(3) == spent_epsilon(1.0, 0.08, 6, 50**-1.1, tight=False)
    assert own(config(BY_ROW), 500).spent(3) < made.spent(3) < own(config(BY_ROW), 5).spent(3)
    assert own(config(BY_ROW), 3).share == 1


def test_an_update_that_is_replaced_moves_by_twice_the_clip_norm() -> None:
    """So the noise counts half; rounds add up, and nothing is sampled."""
    made = own(config(LOCAL), 50)
    assert made.spent(3) == spent_epsilon(2.0, 1.0, 3, 1e-3, tight=False)
    assert made.statement("")["adjacency"] == "the client's rows replaced by any others"


@pytest.mark.parametrize("privacy", [{**BY_ROW}, {**LOCAL}], ids=["dp-sgd", "local"])
def test_a_target_is_kept_in_all_rounds(privacy: dict[str, Any]) -> None:
    del privacy["noise_multiplier"]
    made = own(config({**privacy, "target_epsilon": 3.0}), 40)
    assert 2.9 < made.spent(3) <= 3.0
    assert [made.exhausted(number) for number in range(4)] == [False, False, False, True]
    assert made.statement("seeded")["epsilon"] == made.spent(3)


def test_the_bound_asks_for_a_little_more_noise_than_is_needed() -> None:
    exact = noise_for(2.0, 0.1, 100, 1e-3)
    assert exact < noise_for(2.0, 0.1, 100, 1e-3, tight=False) < 1.25 * exact


# ---------------------------------------------------------------------------------------------------- the rounds


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> StackedModel:
    return load(tiny_model_folder, AdapterConfig(rank=4, alpha=8))


CLIENTS = {"few": make_examples(1, 5), "many": make_examples(2, 20)}


def simulate(
    run: RunConfig, model: StackedModel, folder: Path, draws: Draws | None = None
) -> tuple[dict[str, Tensor], list[RoundRecord]]:
    engine = Simulation(run, model, CLIENTS, ClientStore(folder), draws=draws)
    records: list[RoundRecord] = []
    fresh = model.fresh_adapter(derive_rng(0, "adapter"))
    start = ServerState(0, run.aggregation.initial(fresh, model.weight, derive_rng(0, "initial")))
    state = train(run, engine, start, lambda state, record: records.append(record))
    return dict(state.adapter.tensors), records


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return all(torch.equal(tensor, right[name]) for name, tensor in left.items())


@pytest.mark.parametrize("privacy", [BY_ROW, LOCAL], ids=["dp-sgd", "local"])
def test_a_simulation_repeats_itself_and_the_systems_noise_does_not(
    model: StackedModel, tmp_path: Path, privacy: dict[str, Any]
) -> None:
    run = config(privacy)
    adapter, records = simulate(run, model, tmp_path / "a")
    again, same_records = simulate(run, model, tmp_path / "b")
    other, _ = simulate(run, model, tmp_path / "c", Draws(None))
    assert same(adapter, again)
    assert records == same_records
    assert not same(adapter, other)
    worst = own(run, 5)
    assert [record.epsilon for record in records] == [worst.spent(number) for number in (1, 2, 3)]


@pytest.mark.parametrize("rule", ["ffa-lora", "median", "hetlora", "fed-sb"])
def test_rules_of_any_kind_take_private_updates(model: StackedModel, tmp_path: Path, rule: str) -> None:
    aggregation = {"name": rule} | ({"weighting": "uniform"} if rule in {"ffa-lora", "fed-sb"} else {})
    _, records = simulate(config(BY_ROW, aggregation=aggregation), model, tmp_path)
    assert not any(record.failures for record in records)


def test_the_noise_of_an_update_is_of_the_promised_size(model: StackedModel, tmp_path: Path) -> None:
    """The clipped update is small beside it."""
    engine = Simulation(config({**LOCAL, "noise_multiplier": 50.0}), model, CLIENTS, ClientStore(tmp_path))
    adapter = model.fresh_adapter(derive_rng(0, "adapter"))
    results = list(engine.run([task_of("few", adapter), task_of("many", adapter)]))
    steps = []
    for result in results:
        assert isinstance(result, ClientUpdate)
        steps.append(torch.cat([tensor.flatten() for tensor in result.update.tensors.values()]).numpy())
    for step in steps:
        assert step.std() == pytest.approx(50 * 0.1, rel=0.03)
    assert abs(np.corrcoef(steps[0], steps[1])[0, 1]) < 0.05


def task_of(client: str, adapter: Any, round_index: int = 0, num_earlier: int = 0) -> Any:
    from fedit.interfaces import ClientTask

    return ClientTask(client, round_index, adapter, num_earlier)


def test_a_client_whose_budget_is_used_up_takes_part_no_more(model: StackedModel, tmp_path: Path) -> None:
    """The one of few rows spends faster."""
    few, many = (own(config(BY_ROW), rows) for rows in (5, 20))
    budget = (few.spent(2) + few.spent(3)) / 2
    assert many.spent(3) < budget
    _, records = simulate(config({**BY_ROW, "target_epsilon": budget}), model, tmp_path)
    assert [record.failures for record in records] == [{}, {}, {"few": "its privacy budget is used up"}]
    assert records[-1].epsilon == few.spent(2)


def test_a_run_ends_with_what_it_has_once_all_budgets_are_used_up(model: StackedModel, tmp_path: Path) -> None:
    few, many = (own(config(BY_ROW), rows) for rows in (5, 20))
    budget = many.spent(8) * 1.001
    assert few.spent(1) < budget < few.spent(8)
    _, records = simulate(config({**BY_ROW, "target_epsilon": budget}, rounds=12), model, tmp_path)
    assert len(records) == 8, "and no error"
    assert list(records[-1].failures) == ["few"]


def test_noise_that_cannot_be_repeated_is_paid_for_each_time(model: StackedModel, tmp_path: Path) -> None:
    """A round that is asked for again costs again, also of a site that was restarted meanwhile."""
    run, adapter = config(BY_ROW), model.fresh_adapter(derive_rng(0, "adapter"))
    spent = []
    for _ in range(3):
        engine = Simulation(run, model, CLIENTS, ClientStore(tmp_path), draws=Draws(None))
        results = list(engine.run([task_of("few", adapter)]))
        assert isinstance(results[0], ClientUpdate)
        spent.append(results[0].epsilon)
    assert spent == [own(run, 5).spent(number) for number in (1, 2, 3)]


def test_the_last_of_a_budget_is_written_down_before_it_is_used(model: StackedModel, tmp_path: Path) -> None:
    """A tuning that is broken off has cost what it would have cost."""
    few = own(config(BY_ROW), 5)
    run = config({**BY_ROW, "target_epsilon": few.spent(1) * 1.01})
    adapter = model.fresh_adapter(derive_rng(0, "adapter"))

    def kill(num_tokens: int) -> None:
        raise KeyboardInterrupt

    engine = Simulation(run, model, CLIENTS, ClientStore(tmp_path), kill, Draws(None))
    with pytest.raises(KeyboardInterrupt):
        list(engine.run([task_of("few", adapter)]))
    engine = Simulation(run, model, CLIENTS, ClientStore(tmp_path), draws=Draws(None))
    assert list(engine.run([task_of("few", adapter)])) == [ClientFailure("few", "its privacy budget is used up")]


# ------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("privacy", "tables", "says"),
    [
        (BY_ROW, {"client": {"local_epochs": 1}}, "the number of steps tells the number of rows"),
        (BY_ROW, {"aggregation": {"name": "fedit"}}, 'Use weighting = "uniform"'),
        (BY_ROW, {"objective": "dpo"}, "its rows come in pairs"),
        (BY_ROW, {"objective": "ditto"}, "a second model is trained"),
        (BY_ROW, {"adapter": {"rank": 4, "alpha": 8, "dropout": 0.1}}, "dropout"),
        (
            BY_ROW,
            {
                "aggregation": {"name": "fedkseed", "weighting": "uniform"},
                "client": {"local_steps": 1, "optimizer": "sgd", "clip_norm": None},
            },
            "no gradients of rows",
        ),
        (LOCAL, {"client": {"local_epochs": 1}}, "the number of steps tells the number of rows"),
        ({**BY_ROW, "clip_quantile": 0.5}, {}, "clip_quantile is for mechanism"),
        ({**LOCAL, "delta": None}, {}, 'mechanism = "local" needs a delta'),
        ({**BY_ROW, "delta": 0.1}, {}, "allows to give one of 20 rows"),
        ({**BY_ROW, "target_epsilon": 0.001}, {}, "costs a client of 20 rows an epsilon of"),
    ],
)
def test_what_would_void_the_guarantee_is_refused(privacy: dict[str, Any], tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        own(config(privacy, **tables), 20)
