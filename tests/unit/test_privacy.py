"""Client-level differential privacy: the mechanism by its mathematics, the accountant by others, the rounds by hand."""

from __future__ import annotations

import json
import logging
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import optimize, stats

from fedit.accounting import accountant, noise_for, spent_epsilon
from fedit.checkpoints import load_state, save_state
from fedit.cohort import sample_cohort
from fedit.config import RunConfig, load_plugins, parse_config
from fedit.federation import _check_account, _with_secret
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, ConfigError, EngineError, plugins
from fedit.privacy import Mechanism, Noise, clip, system_noise
from fedit.server import RoundRecord, ServerState, run_round, train

load_plugins()

A, B = "layer.lora_A.weight", "layer.lora_B.weight"
NAMES = [f"c{number}" for number in range(10)]


def config(privacy: object = None, **tables: Any) -> RunConfig:
    tables = {
        "rounds": 3,
        "adapter": {"rank": 2, "alpha": 4},
        "aggregation": {"name": "fedit", "weighting": "uniform"},
        "cohort": {"sampling": "poisson", "fraction": 0.5},
        **tables,
    }
    return parse_config({"privacy": privacy or {"noise_multiplier": 1.0, "clip_norm": 0.5}, **tables})


def mechanism(run: RunConfig, num_clients: int = len(NAMES)) -> Mechanism:
    made = Mechanism.of(run, num_clients)
    assert made is not None
    return made


def adapter(seed: int, scale: float = 1.0, rank: int = 2, num_inputs: int = 5) -> Adapter:
    rng = np.random.default_rng(seed)
    tensors = {A: rng.normal(size=(rank, num_inputs)), B: rng.normal(size=(3, rank))}
    return Adapter({n: scale * torch.from_numpy(array.astype(np.float32)) for n, array in tensors.items()}, rank, 4.0)


def update(client: str, tensors: Adapter) -> ClientUpdate:
    return ClientUpdate(client, tensors, num_examples=10, num_tokens=100, loss=1.0, num_steps=2)


def silence(shape: tuple[int, ...]) -> np.ndarray:
    return np.zeros(shape)


def seeded(seed: int) -> Noise:
    return np.random.default_rng(seed).standard_normal


def norm(tensors: Any) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


# --------------------------------------------------------------------------------------------------- the mechanism


@settings(deadline=None)
@given(st.integers(0, 1000), st.floats(1e-3, 1e3), st.floats(1e-3, 1e3))
def test_clipping_keeps_the_direction_and_bounds_the_norm(seed: int, scale: float, bound: float) -> None:
    tensors = adapter(seed, scale).tensors
    clipped, before = clip(tensors, bound)
    assert before == pytest.approx(norm(tensors))
    assert norm(clipped) <= bound * (1 + 1e-12) or norm(clipped) == pytest.approx(before)
    assert norm(clipped) == pytest.approx(min(bound, before))
    for name, tensor in tensors.items():
        torch.testing.assert_close(clipped[name] * before, tensor.double() * norm(clipped))


def mean_of(made: Mechanism, updates: Sequence[ClientUpdate], noise: Noise, clip_norm: float = 0.5) -> dict[str, Any]:
    start = adapter(0)
    result, _ = made.mean(start, start.tensors, updates, clip_norm, noise)
    assert (result.num_examples, result.num_steps, result.loss, result.num_tokens) == (1, 1, 0.0, 0)
    return dict(result.update.tensors)


@settings(deadline=None)
@given(st.integers(0, 8), st.floats(0.01, 100))
def test_without_noise_it_is_the_sum_of_clipped_updates_over_the_expected_size(count: int, scale: float) -> None:
    """Whoever came: 5 clients are expected."""
    updates = [update(f"c{number}", adapter(number, scale)) for number in range(count)]
    mean = mean_of(mechanism(config()), updates, silence)
    for name, tensor in mean.items():
        clipped = [clip(each.update.tensors, 0.5)[0][name] for each in updates]
        torch.testing.assert_close(tensor, sum(clipped, torch.zeros_like(tensor)) / 5)


@settings(deadline=None)
@given(st.integers(0, 6), st.integers(0, 6), st.floats(0.01, 1e6))
def test_one_client_moves_the_mean_by_the_clip_norm_at_most(count: int, which: int, scale: float) -> None:
    """Both neighbours have the same noise, so that what is left is the sensitivity."""
    made = mechanism(config())
    updates = [update(f"c{number}", adapter(number, scale)) for number in range(count + 1)]
    without = [each for number, each in enumerate(updates) if number != which % (count + 1)]
    one, other = (mean_of(made, rows, seeded(3)) for rows in (updates, without))
    assert norm({name: one[name] - other[name] for name in one}) <= 0.5 / 5 * (1 + 1e-9)


@pytest.mark.parametrize("noise", [seeded(0), system_noise], ids=["seeded", "system"])
@pytest.mark.parametrize("quantile", [None, 0.5])
def test_the_noise_is_what_the_accountant_counts_on(noise: Noise, quantile: float | None) -> None:
    """Its size, within 1%, and its normality; half of it, or clipping left out, would be found here."""
    made = mechanism(config({"noise_multiplier": 1.5, "clip_norm": 0.5, "clip_quantile": quantile}))
    start = adapter(0, num_inputs=50_000)
    result, _ = made.mean(start, start.tensors, [], 0.5, noise)
    numbers = result.update.tensors[A].numpy().ravel()
    size = 1.5 if quantile is None else (1.5**-2 - (2 * 1.5) ** -2) ** -0.5
    assert numbers.std() == pytest.approx(size * 0.5 / 5, rel=0.01)
    assert abs(numbers.mean()) < 4 * size * 0.1 / len(numbers) ** 0.5
    assert stats.kstest(numbers / numbers.std(), "norm").pvalue > 1e-4


def test_the_systems_noise_is_normal_and_never_the_same() -> None:
    numbers = system_noise((2, 250_000)).ravel()
    assert stats.kstest(numbers, "norm").pvalue > 1e-4
    assert stats.kurtosis(numbers) == pytest.approx(0, abs=0.03)
    assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.01
    assert np.abs(numbers).max() < 7
    assert not np.array_equal(system_noise((10,)), system_noise((10,)))


def test_the_clip_norm_follows_the_quantile() -> None:
    """Without noise it ends where so many of the updates' norms are below it (1905.03871)."""
    run = config({"noise_multiplier": 1.0, "clip_norm": 0.01, "clip_quantile": 0.3}, cohort={"sampling": "poisson"})
    made = mechanism(run, 100)
    norms = np.linspace(1.0, 3.0, 100)
    updates = [update(f"c{number}", adapter(0, size / norm(adapter(0).tensors))) for number, size in enumerate(norms)]
    clip_norm = 0.01
    for _ in range(300):
        _, clip_norm = made.mean(adapter(0), adapter(0).tensors, updates, clip_norm, silence)
    assert clip_norm == pytest.approx(np.quantile(norms, 0.3), rel=0.02)


def test_what_the_count_costs_is_paid_by_more_noise_on_the_updates() -> None:
    """1 / z^2 = 1 / z_u^2 + 1 / (2 sigma_b)^2: both queries together are one with the multiplier z."""
    made = mechanism(
        config({"noise_multiplier": 0.8, "clip_quantile": 0.5}, cohort={"sampling": "poisson", "fraction": 0.05}), 1000
    )
    assert made.count_noise == 50 / 20
    assert made.update_noise**-2 + (2 * made.count_noise) ** -2 == pytest.approx(0.8**-2)
    small = mechanism(config({"noise_multiplier": 3.0, "clip_quantile": 0.5}))
    assert small.update_noise == pytest.approx(3.0 / math.sqrt(0.75))


# ---------------------------------------------------------------------------------------------------- noise in shares

DISTRIBUTED = {"mechanism": "distributed", "noise_multiplier": 1.5, "clip_norm": 0.5}


def test_of_noise_in_shares_the_server_adds_what_is_missing() -> None:
    """A mean of three that come as one is three in the sum, whatever its norm, and the variance is always the same."""
    made = mechanism(config(DISTRIBUTED))
    assert made.variance == 2.0, "four of four have that, three being needed"
    start = adapter(0, num_inputs=50_000)
    for shares in (0.0, 1.5, 2.0):
        mean = replace(update("c0", start), others=("c3", "c7"), noise_shares=shares)
        result, _ = made.mean(start, start.tensors, [mean], 0.5, seeded(0))
        noise = result.update.tensors[A] - start.tensors[A].double() * 3 / 5
        assert float(noise.std()) == pytest.approx(1.5 * 0.5 * math.sqrt(2 - shares) / 5, rel=0.01, abs=1e-12)


def test_of_noise_in_shares_a_round_that_nobody_comes_to_is_the_servers_noise() -> None:
    made = mechanism(config(DISTRIBUTED))
    start = adapter(0, num_inputs=50_000)
    result, _ = made.mean(start, start.tensors, [], 0.5, seeded(0))
    assert result.update.tensors[A].numpy().std() == pytest.approx(math.sqrt(2) * 1.5 * 0.5 / 5, rel=0.01)


def test_against_who_knows_who_was_drawn_sampling_hides_nobody() -> None:
    """Its epsilon is that of the exact formula, of the rounds that a client is in; and larger than the others'."""
    made = mechanism(config(DISTRIBUTED, rounds=20))
    epsilon = made.spent_against_parties(9)
    sigma, delta = 1.5 / 3, made.delta  # nine rounds of one client are one with a third of the noise
    exact = stats.norm.cdf(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * stats.norm.cdf(
        -0.5 / sigma - epsilon * sigma
    )
    assert exact == pytest.approx(delta, rel=0.01)
    assert epsilon > made.spent(9)
    statement = made.statement("", 9)
    assert f"against them epsilon is {epsilon:.3g}, of 9 rounds of one client" in statement["trust"]
    assert statement["epsilon"] == mechanism(config({**DISTRIBUTED, "mechanism": "central"}, rounds=20)).spent(20)


def test_discrete_noise_costs_what_continuous_noise_costs() -> None:
    """By the accountant's own discrete Gaussian, at a hundredth of the finest grid that is let through."""
    from dp_accounting.pld import privacy_loss_distribution as pld

    sigma, steps = 1.5, 10  # of the clip norm, in steps of the grid
    discrete = pld.from_discrete_gaussian_mechanism(sigma * steps, sensitivity=steps)
    continuous = pld.from_gaussian_mechanism(sigma)
    for delta in (1e-2, 1e-4):
        assert discrete.get_epsilon_for_delta(delta) == pytest.approx(continuous.get_epsilon_for_delta(delta), rel=0.02)


# --------------------------------------------------------------------------------------------------- the accountant

REFERENCES = [
    (1000, 50, 100, {1: 1.66, 4: 0.80, 8: 0.60}),
    (100, 10, 50, {1: 1.68, 4: 0.80, 8: 0.59}),
    (10_000, 100, 200, {1: 0.92, 4: 0.59, 8: 0.47}),
]


@pytest.mark.slow
@pytest.mark.parametrize(("num_clients", "cohort", "rounds", "noise"), REFERENCES)
def test_the_noise_that_a_target_needs(num_clients: int, cohort: int, rounds: int, noise: dict[int, float]) -> None:
    """Within 2% of multipliers that were computed elsewhere, delta = N^-1.1."""
    share, delta = cohort / num_clients, num_clients**-1.1
    for epsilon, multiplier in noise.items():
        found = noise_for(epsilon, share, rounds, delta)
        assert found == pytest.approx(multiplier, rel=0.02)
        assert 0.99 * epsilon < spent_epsilon(found, share, rounds, delta) <= epsilon


@pytest.mark.parametrize(("noise", "share", "rounds"), [(0.8, 0.05, 100), (1.2, 0.1, 50), (0.6, 0.01, 200)])
def test_opacus_agrees(noise: float, share: float, rounds: int) -> None:
    """Its numerical accountant to a percent, which is built in another way; its Renyi accountant is above both."""
    epsilons = []
    for other in (PRVAccountant(), RDPAccountant()):
        other.history = [(noise, share, rounds)]
        epsilons.append(other.get_epsilon(delta=1e-4))
    ours = spent_epsilon(noise, share, rounds, 1e-4)
    assert ours == pytest.approx(epsilons[0], rel=0.01)
    assert ours < epsilons[1]


@pytest.mark.parametrize(("noise", "rounds"), [(1.0, 1), (4.0, 10)])
def test_without_sampling_the_epsilon_has_a_formula(noise: float, rounds: int) -> None:
    """T rounds are one with z / sqrt(T), whose delta (1805.06530) is Phi(m/2 - e/m) - exp(e) Phi(-m/2 - e/m)."""
    m = math.sqrt(rounds) / noise

    def delta(epsilon: float) -> float:
        below, above = stats.norm.cdf([m / 2 - epsilon / m, -m / 2 - epsilon / m])
        return float(below - math.exp(epsilon) * above)

    exact = optimize.brentq(lambda epsilon: delta(epsilon) - 1e-3, 1e-6, 100)
    assert spent_epsilon(noise, 1.0, rounds, 1e-3) == pytest.approx(exact, rel=1e-3)


def test_more_rounds_spend_more_and_more_noise_less() -> None:
    spent = [spent_epsilon(1.0, 0.1, rounds, 1e-3) for rounds in (0, 1, 5, 20)]
    assert spent[0] == 0
    assert spent == sorted(spent)
    assert spent_epsilon(1.1, 0.1, 5, 1e-3) < spent[2] < spent_epsilon(1.0, 0.2, 5, 1e-3)


def test_a_target_that_no_noise_reaches_is_said() -> None:
    with pytest.raises(ConfigError, match=r"target_epsilon = 1e-09 is out of reach in 10 rounds"):
        noise_for(1e-9, 1.0, 10, 1e-12)


def test_without_the_accountant_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    for call in (accountant, lambda: noise_for(2.0, 0.123, 3, 1e-3), lambda: spent_epsilon(1.0, 0.123, 3, 1e-3)):
        with pytest.raises(ConfigError, match=r"pip install 'fedit\[privacy\]'"):
            call()


# ----------------------------------------------------------------------------------------------------- the rounds


@dataclass
class Engine:
    """Clients with updates of their own; those in `failing` return none."""

    failing: tuple[str, ...] = ()
    scale: float = 1.0

    def clients(self) -> dict[str, int]:
        return dict.fromkeys(NAMES, 10)

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            number = 100 * task.round_index + int(task.client[1:])
            if task.client in self.failing:
                yield ClientFailure(task.client, "broken")
            else:
                yield update(task.client, adapter(number, self.scale))


def finish(run: RunConfig, state: ServerState, engine: Engine | None = None) -> tuple[ServerState, list[RoundRecord]]:
    records: list[RoundRecord] = []
    state = train(run, engine or Engine(), state, lambda state, record: records.append(record), seeded)
    return state, records


def test_a_round_by_hand() -> None:
    run = config()
    state, record = run_round(run, Engine(), ServerState(0, adapter(0)), silence)
    cohort = sample_cohort(run, Engine().clients(), 0)
    assert record.cohort == cohort
    for name in (A, B):
        clipped = [clip(adapter(int(client[1:])).tensors, 0.5)[0][name] for client in cohort]
        torch.testing.assert_close(
            state.adapter.tensors[name], (adapter(0).tensors[name].double() + sum(clipped) / 5).float()
        )
    assert record.epsilon == spent_epsilon(1.0, 0.5, 1, len(NAMES) ** -1.1)
    assert record.clip_norm == 0.5


def test_a_round_that_nobody_comes_to_is_noise() -> None:
    """Left out, it would tell that nobody was drawn; the same where all who came failed."""
    rare = config(cohort={"sampling": "poisson", "fraction": 1e-9})
    for run, engine in ((rare, Engine()), (config(), Engine(failing=tuple(NAMES)))):
        state, record = run_round(run, engine, ServerState(0, adapter(0)), seeded(0))
        assert record.update_norm > 0
        assert state.round_index == 1
        assert record.epsilon is not None


def test_the_clients_are_told_what_it_costs() -> None:
    seen: list[ClientTask] = []

    class Listening(Engine):
        def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
            seen.extend(tasks)
            return super().run(tasks)

    finish(config(), ServerState(0, adapter(0)), Listening())
    made = mechanism(config())
    assert {(task.round_index, task.epsilon) for task in seen} == {(i, made.spent(i + 1)) for i in range(3)}


def test_a_run_that_goes_on_has_the_same_epsilon_clip_norm_and_bits(tmp_path: Path) -> None:
    """From its checkpoint after each round."""
    run = config({"noise_multiplier": 1.0, "clip_quantile": 0.5}, rounds=4)
    whole, records = finish(run, ServerState(0, adapter(0)))
    state = ServerState(0, adapter(0))
    for number, record in enumerate(records):
        state, again = run_round(run, Engine(), state, seeded(number))
        assert (again.epsilon, again.clip_norm) == (record.epsilon, record.clip_norm)
        save_state(state, tmp_path)
        loaded = load_state(tmp_path)
        assert loaded is not None
        state = loaded
    assert state.clip_norm == whole.clip_norm != 1.0
    for name in (A, B):
        assert torch.equal(state.adapter.tensors[name], whole.adapter.tensors[name])


def test_a_budget_that_is_exhausted_ends_the_run_before_the_round_that_would_break_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    made = mechanism(config())
    budget = (made.spent(2) + made.spent(3)) / 2
    run = config({"noise_multiplier": 1.0, "target_epsilon": budget}, rounds=5)
    with caplog.at_level(logging.WARNING):
        state, records = finish(run, ServerState(0, adapter(0)))
    assert state.round_index == len(records) == 2
    assert records[-1].epsilon is not None
    assert records[-1].epsilon < budget
    assert "no round after 2" in caplog.text
    assert finish(run, state)[0] is state, "and it stays ended"


def test_what_is_promised_is_what_the_budget_affords() -> None:
    made = mechanism(config())
    budget = (made.spent(2) + made.spent(3)) / 2
    statement = mechanism(config({"noise_multiplier": 1.0, "target_epsilon": budget}, rounds=50)).statement("", 1)
    assert (statement["rounds"], statement["epsilon"]) == (2, made.spent(2))
    with pytest.raises(ConfigError, match=r"noise_multiplier = 1 costs an epsilon of .* in the first round, more than"):
        mechanism(config({"noise_multiplier": 1.0, "target_epsilon": 0.01}))


def test_a_target_is_reached_in_the_last_round_and_not_exceeded() -> None:
    made = mechanism(config({"target_epsilon": 3.0}, rounds=6))
    assert 2.95 < made.spent(6) <= 3.0
    assert not any(made.exhausted(index) for index in range(6))


def test_what_is_told_of_a_round_has_no_exact_number_of_its_clients() -> None:
    _, (record, *_) = finish(config(), ServerState(0, adapter(0)), Engine(failing=("c1",)))
    told = record.withheld()
    assert (told.cohort, told.failures, told.train_loss, told.aggregation_loss) == ([], {}, None, None)
    assert (told.bytes_up, told.bytes_down, told.tokens) == (0, 0, 0)
    assert told.update_norm == 0
    assert (told.epsilon, told.clip_norm) == (record.epsilon, record.clip_norm)


def test_a_secret_draws_the_cohorts_and_is_in_no_description() -> None:
    run = config()
    secret = run.model_copy(update={"cohort_secret": 12345})
    clients = dict.fromkeys((f"c{number}" for number in range(200)), 10)
    assert sample_cohort(run, clients, 0) != sample_cohort(secret, clients, 0)
    assert "12345" not in str(secret.to_json())
    assert "12345" not in repr(secret)
    assert secret.digest() == run.digest()


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ({"cohort": {}}, 'Use sampling = "poisson"'),
        ({"cohort": {"sampling": "poisson", "availability": 0.5}}, "who is online"),
        ({"cohort": {"sampling": "poisson", "min_updates": 2}}, "min_updates = 2"),
        ({"aggregation": {"name": "fedit"}}, 'Use weighting = "uniform"'),
        ({"aggregation": {"name": "fedit", "weighting": "tokens"}}, 'Use weighting = "uniform"'),
        ({"aggregation": {"name": "median"}}, "'median': it needs each client's update"),
        ({"aggregation": {"name": "fedex-lora", "weighting": "uniform"}}, "'fedex-lora': it needs each client's"),
        ({"aggregation": {"name": "hetlora"}, "adapter": {"rank": [1, 2]}}, "weighting"),
        ({"upload": {"mask": "top-k", "density": 0.1}}, 'mask = "top-k"'),
        ({"engine": {"merge_clients": True}}, "merge_clients"),
        ({"objective": "scaffold", "client": {"local_steps": 1, "optimizer": "sgd", "clip_norm": None}}, "scaffold"),
        ({"privacy": {"noise_multiplier": 1.0, "delta": 0.2}}, r"delta = 0\.2 allows to give one of 10 clients away"),
        ({"privacy": {"clip_norm": 1.0}}, "give target_epsilon, noise_multiplier, or both"),
        ({"privacy": "strnog"}, "Did you mean 'strong'"),
    ],
)
def test_what_would_void_the_guarantee_is_refused(tables: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        mechanism(config(tables.get("privacy"), **{key: table for key, table in tables.items() if key != "privacy"}))


def test_the_rules_that_are_let_through_are_those_that_the_refusal_names() -> None:
    let_through = set()
    for name, rule in plugins("aggregation").items():
        tables: dict[str, Any] = {"aggregation": {"name": name}}
        if "weighting" in rule.model_fields:
            tables["aggregation"]["weighting"] = "uniform"
        try:
            made = mechanism(config(**tables))
        except ConfigError:
            continue
        let_through.add(name)
        assert made.noise_multiplier == 1
    assert let_through == {"fedit", "ffa-lora", "rolora", "fedsa-lora", "fedsvd", "fed-sb", "tinylora"}
    with pytest.raises(ConfigError) as refused:
        config(aggregation={"name": "median"})
    assert all(name in str(refused.value) for name in let_through)


def test_a_real_run_draws_a_secret_once_and_keeps_it_to_itself(tmp_path: Path) -> None:
    run = config()
    with_secret = _with_secret(run, tmp_path / "run")
    file = tmp_path / "run" / ".cohorts.secret"
    assert file.stat().st_mode & 0o777 == 0o600
    assert with_secret.cohort_secret == int(file.read_text(), 16)
    assert _with_secret(run, tmp_path / "run").cohort_secret == with_secret.cohort_secret
    assert _with_secret(run, tmp_path / "other").cohort_secret != with_secret.cohort_secret
    (tmp_path / "run" / "partition.json").write_text("{}")
    file.unlink()
    with pytest.raises(EngineError, match=r"cohorts\.secret is gone"):
        _with_secret(run, tmp_path / "run")
    assert _with_secret(parse_config({}), tmp_path / "plain").cohort_secret is None
    assert not (tmp_path / "plain").exists()


@pytest.mark.parametrize(
    ("told", "saved", "noise", "says"),
    [
        (3, 3, 1.0, None),
        (3, 2, 1.0, None),  # killed between a round's line and its checkpoint
        (3, 1, 1.0, "has told 3 rounds, and its last checkpoint is of round 1"),
        (2, 0, 1.0, "has told 2 rounds, and its last checkpoint is of round 0"),
        (3, 3, 1.1, r"was started with a noise multiplier of 1\.1"),
    ],
)
def test_a_run_whose_account_would_be_wrong_does_not_go_on(
    tmp_path: Path, told: int, saved: int, noise: float, says: str | None
) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "partition.json").write_text(json.dumps({"privacy": {"noise_multiplier": noise}}))
    (tmp_path / "rounds.jsonl").write_text("".join(f'{{"round": {number + 1}}}\n' for number in range(told)))
    with pytest.raises(EngineError, match=says) if says else nullcontext():
        _check_account(tmp_path, mechanism(config()), saved)


def test_a_recipe_cannot_set_the_secret() -> None:
    with pytest.raises(ConfigError, match="cohort_secret is no key of a recipe"):
        config(cohort_secret=5)


def test_presets() -> None:
    assert config("none").privacy is None
    epsilons = []
    for preset in ("standard", "strong"):
        privacy = config(preset).privacy
        assert privacy is not None
        assert privacy.clip_quantile == 0.5
        epsilons.append(privacy.target_epsilon)
    assert epsilons == [8.0, 1.0]
