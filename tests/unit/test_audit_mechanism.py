"""The adversary against the noise: what holds is not called broken, and each planted flaw is found."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from fedit import privacy, private_stack
from fedit.audit import mechanism as audited
from fedit.audit.folder import violations
from fedit.audit.mechanism import (
    Promise,
    attack,
    audit_mechanism,
    central_promise,
    central_release,
    parties_promise,
    rows_release,
    shares_release,
)
from fedit.audit.subject import Setting
from fedit.cohort import most_rounds
from fedit.config import RunConfig, load_config
from fedit.interfaces import Adapter, ClientFailure, ClientTask, ClientUpdate, derive_rng, derive_seed
from fedit.own_privacy import OwnPrivacy
from fedit.privacy import Draws, Mechanism, clip, system_noise
from fedit.secure import encoding
from fedit.secure.encoding import PartySum
from fedit.server import ServerState, train

SIZES = {str(index): 100 for index in range(100)}
CENTRAL = ("cohort.sampling=poisson", "cohort.fraction=0.2", "privacy.noise_multiplier=0.8", "privacy.clip_norm=0.5")
ROWS = ("privacy.mechanism=dp-sgd", "privacy.target_epsilon=8", "privacy.clip_norm=0.1")
LOCAL = ("privacy.mechanism=local", "privacy.noise_multiplier=2", "privacy.clip_norm=0.1", "privacy.delta=1e-5")
SHARES = (*CENTRAL, "privacy.mechanism=distributed")
KINDS = {"central": CENTRAL, "distributed": SHARES, "dp-sgd": ROWS, "local": LOCAL}


def config(kind: str, *more: str) -> RunConfig:
    return load_config("default", ["aggregation.weighting=uniform", *KINDS[kind], *more])


def central() -> Mechanism:
    mechanism = Mechanism.of(config("central"), len(SIZES))
    assert mechanism is not None
    return mechanism


def rows() -> OwnPrivacy:
    own = OwnPrivacy.of(config("dp-sgd"), 100)
    assert own is not None
    return own


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audited, "NUM_RUNS", 4)
    monkeypatch.setattr(audited, "NUM_CANARIES", 512)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_what_holds_is_not_called_broken_and_nearly_found(kind: str, seed: int) -> None:
    found = audit_mechanism(config(kind, f"seed={seed}"), SIZES)
    assert found is not None
    assert found.holds
    assert found.found_noise is not None
    most = 1.6 if found.noise_multiplier < 1.5 else 2  # more noise would take more canaries, or rounds
    assert found.noise_multiplier <= found.found_noise < most * found.noise_multiplier
    assert 0 < found.found_epsilon < found.epsilon
    assert 0 < found.one_run_epsilon < found.one_run_accountant


def test_a_run_without_noise_has_no_mechanism_to_attack() -> None:
    assert audit_mechanism(load_config("default"), SIZES) is None


def test_adaptive_clipping_splits_the_noise() -> None:
    found = audit_mechanism(config("central", "privacy.clip_quantile=0.5"), SIZES)
    assert found is not None
    assert found.holds
    assert found.epsilon == pytest.approx(central().spent(central().num_affordable))


# ----------------------------------------------------------------------------------------------- planted flaws


def unclipped(tensors: Any, bound: float) -> tuple[dict[str, torch.Tensor], float]:
    return {name: tensor.double() for name, tensor in tensors.items()}, bound


def test_missing_clipping_of_clients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(privacy, "clip", unclipped)
    found = audit_mechanism(config("central"), SIZES)
    assert found is not None
    assert not found.holds
    (said,) = violations([(Setting("central", "this run", config("central")), found)], [], {})
    assert "0.8 are promised" in said


def test_missing_clipping_of_local_updates(monkeypatch: pytest.MonkeyPatch) -> None:
    from fedit.engines import simulation

    monkeypatch.setattr(simulation, "clip", unclipped)
    found = audit_mechanism(config("local"), SIZES)
    assert found is not None
    assert not found.holds


def by_tensor(tensors: Any, bound: float) -> tuple[dict[str, torch.Tensor], float]:
    return {name: clip({name: tensor}, bound)[0][name] for name, tensor in tensors.items()}, bound


@pytest.mark.parametrize("kind", ["central", "distributed", "local"])
def test_clipping_tensor_by_tensor(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedit.engines import simulation

    for module in (privacy, encoding, simulation):
        monkeypatch.setattr(module, "clip", by_tensor)
    found = audit_mechanism(config(kind), SIZES)
    assert found is not None
    assert not found.holds


def test_noise_that_is_used_again_in_the_other_tensor() -> None:
    again = lambda index: lambda shape: np.random.default_rng(index).standard_normal(shape)
    assert not attack(central_release(central(), again), central_promise(central()), 0).holds


@pytest.mark.parametrize("forgotten", [0, 1])
def test_a_tensor_without_noise(forgotten: int) -> None:
    def noise(index: int) -> privacy.Noise:
        numbers = itertools.count()
        return lambda shape: np.random.default_rng(index).standard_normal(shape) * (next(numbers) != forgotten)

    assert not attack(central_release(central(), noise), central_promise(central()), 0).holds


def test_missing_clipping_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    start = private_stack.PrivateStack.start

    def never_clips(self, slot, privacy, *others) -> None:
        start(self, slot, privacy, *others)
        self._clip_norms[slot] = math.inf

    monkeypatch.setattr(private_stack.PrivateStack, "start", never_clips)
    assert not broken_rows().holds


def broken_rows(own: OwnPrivacy | None = None, draws: Draws | None = None) -> audited.MechanismAudit:
    honest = rows()
    release = rows_release(own or honest, draws or Draws(7))
    promise = Promise("dp-sgd", honest.noise_multiplier, 8.0, lambda noise: 8.0)
    return attack(release, promise, 0, rows_release(honest, Draws(derive_seed(0, "privacy"))))


@pytest.mark.parametrize("factor", [0.5, 0.7])
def test_noise_that_is_too_small(factor: float) -> None:
    """By 2x, and less."""
    less = dataclasses.replace(rows(), noise_multiplier=factor * rows().noise_multiplier)
    assert not broken_rows(less).holds
    mechanism = central()
    less_central = dataclasses.replace(mechanism, noise_multiplier=factor * mechanism.noise_multiplier)
    release = central_release(less_central, lambda index: np.random.default_rng(index).standard_normal)
    found = attack(release, central_promise(mechanism), 0)
    assert not found.holds
    assert found.found_epsilon > found.epsilon


def test_noise_that_is_used_again_in_other_rounds() -> None:
    release = central_release(central(), lambda index: np.random.default_rng(3).standard_normal)
    found = attack(release, central_promise(central()), 0)
    assert not found.holds
    assert found.found_noise == pytest.approx(0.8 / 3, rel=0.2)  # no canary was missed, nor another taken for one


def test_noise_that_is_used_again_in_every_other_round() -> None:
    release = central_release(central(), lambda index: np.random.default_rng(index // 2).standard_normal)
    assert not attack(release, central_promise(central()), 0).holds


class SameInAllSteps(Draws):
    """Forgets the step."""

    def normal(self, shape, *purpose):
        return super().normal(shape, purpose[0])


def test_noise_that_is_used_again_in_other_steps() -> None:
    assert not broken_rows(draws=SameInAllSteps(7)).holds


def test_noise_that_is_used_again_in_all_steps_of_a_tuning(monkeypatch: pytest.MonkeyPatch) -> None:
    take = private_stack.PrivateStack.take_gradients

    def forgets_to_count(self, slots=slice(None)):
        before = dict(self._steps)
        taken = take(self, slots)
        self._steps = before
        return taken

    monkeypatch.setattr(private_stack.PrivateStack, "take_gradients", forgets_to_count)
    assert not broken_rows().holds


def broken_shares(draws: Draws | None = None) -> audited.MechanismAudit:
    run = config("distributed")
    mechanism = Mechanism.of(run, len(SIZES))
    assert mechanism is not None
    promise = parties_promise(mechanism, most_rounds(run, SIZES))
    return attack(shares_release(run, mechanism, draws or Draws(7)), promise, 0)


def test_parties_that_do_not_clip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "clip", lambda tensors, bound: (dict(tensors), 0.0))
    assert not broken_shares().holds


def test_shares_of_noise_that_count_on_the_adversarys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of t parties, of variance z^2 / t in place of z^2 / (t - 1)."""
    add_noise = PartySum.add_noise
    monkeypatch.setattr(PartySum, "add_noise", lambda self, fewest, uniform: add_noise(self, fewest + 1, uniform))
    found = broken_shares()
    assert not found.holds
    assert found.found_noise is not None
    assert found.found_noise < found.noise_multiplier


class SameInAllRounds(Draws):
    """Forgets the round."""

    def uniform(self, size, *purpose):
        return super().uniform(size, *purpose[1:])


def test_shares_of_noise_that_are_used_again_in_other_rounds() -> None:
    assert not broken_shares(SameInAllRounds(7)).holds


class Idle:
    """Clients that change nothing: what is left is noise."""

    def clients(self) -> dict[str, int]:
        return SIZES

    def run(self, tasks: Sequence[ClientTask]) -> Iterator[ClientUpdate | ClientFailure]:
        for task in tasks:
            zeros = {name: torch.zeros_like(tensor) for name, tensor in task.adapter.tensors.items()}
            yield ClientUpdate(task.client, task.adapter.with_tensors(zeros), 1, 1, 0.0, 1)


SEEDED = lambda index: derive_rng(0, "privacy", index).standard_normal


@pytest.mark.parametrize("noise", [{}, {"noise": SEEDED}], ids=["real", "simulated"])
def test_the_rounds_of_a_run_have_noise_of_their_own(noise: dict[str, Any]) -> None:
    """The whole server: by the operating system, as in real federations, and by the seed, as in simulations."""
    names = ("layer.lora_A.weight", "layer.lora_B.weight")
    adapter = Adapter(dict(zip(names, (torch.zeros(8, 500), torch.zeros(500, 8)), strict=True)), 8, 8.0)
    run = config("central", "rounds=4", "server_optimizer.learning_rate=1.0", "client.moments=reset")
    states = [ServerState(0, adapter)]
    train(run, Idle(), states[0], lambda state, record: states.append(state), **noise)
    flat = torch.stack([torch.cat([state.adapter.tensors[name].flatten() for name in names]) for state in states])
    steps = flat.diff(dim=0)
    assert steps.std(dim=1).numpy() == pytest.approx(central().noise_multiplier * 0.5 / 20, rel=0.05)
    assert (torch.corrcoef(steps) - torch.eye(4)).abs().max() < 5 / math.sqrt(8000)


def test_noise_that_the_public_seed_gives_away() -> None:
    drawn = lambda index: derive_rng(0, "privacy", index).standard_normal
    release = central_release(central(), drawn)
    found = attack(release, central_promise(central()), 0, release)
    assert not found.holds
    assert not broken_rows(draws=Draws(derive_seed(0, "privacy"))).holds
    # Who does not know it sees noise as promised.
    assert attack(central_release(central(), drawn), central_promise(central()), 0).holds


def test_the_operating_systems_noise_is_not_given_away() -> None:
    """What real federations draw: the run's seed tells nothing of it."""
    known = central_release(central(), SEEDED)
    assert attack(central_release(central(), lambda index: system_noise), central_promise(central()), 0, known).holds
    assert broken_rows(draws=Draws(None)).holds
