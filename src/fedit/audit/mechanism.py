"""Whether noise hides what it promises to: the strongest adversary against the mechanism itself, in one run of it.

Canary i sends an update of ten times the clip norm, of which the share a lies on a coordinate of its own, in one
tensor, and the rest on one that all have in common, in another tensor of the same shape; its sign changes from round to
round, and the tensors change places from run to run. A fair coin decides whether it takes part, in all rounds or in
none. The adversary sees every noisy sum and knows all but the coins. If what is promised holds, T rounds
of noise z leave each coin behind a shift of a sqrt(T) / z standard deviations (Gaussian differential privacy,
1905.02383), with a such that this is about `SHIFT`: neither hidden altogether nor seen at a glance. As many coordinates
have no canary: they tell the adversary how the noise of the rounds goes together. It takes off what the run's public
seed would draw, or what the other tensor got, and weighs the rounds by the inverse of the covariance of what is left.
So it sees

- updates that are not clipped, or tensor by tensor: the shift is tenfold, or 1 / a of what it has to be;
- noise that is too small, or missing in a tensor: the shift grows as it shrinks;
- noise that is used again, or that the seed gives away: what is the same in two rounds, or two tensors, falls out.

Of noise in shares it is a party, and knows its own share.

Which shifts its errors refute follows from exact intervals of both kinds of them (2302.07956). The noise multiplier
that gives the largest such shift is found: the noise is that at most, and the accountant says what epsilon it costs.
The bound that assumes no shape of the noise (`fedit.audit.bounds`) is given beside it: always valid, and far below.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from fedit.accounting import spent_epsilon
from fedit.audit.bounds import empirical_epsilon, share_interval
from fedit.cohort import most_rounds
from fedit.config import RunConfig
from fedit.engines.client_store import ClientStore
from fedit.engines.simulation import Simulation
from fedit.interfaces import Adapter, ClientUpdate, derive_rng, derive_seed
from fedit.model import StackedModel
from fedit.own_privacy import OwnPrivacy
from fedit.privacy import Draws, Mechanism, Noise
from fedit.private_stack import PrivateStack, RowPrivacy
from fedit.secure.encoding import Encoding, PartySum

NUM_CANARIES = 1024
"""In each of `NUM_RUNS` runs of `NUM_ROUNDS` rounds, one after the other"""
NUM_RUNS = 8
NUM_ROUNDS = 8
SHIFT = 1.5
MOST_SHARE = 0.7
"""Of a canary's norm for itself: the rest is what clipping tensor by tensor would give it back."""
TOO_LONG = 10.0
"""Norm of a canary's update before it is clipped, clip norms"""
CONFIDENCE = 0.999
"""Of what says that a promise is broken: it ends a command with an error."""
DELTA = 1e-6
"""Of the bound that assumes no shape: so small that it counts for little in spite of the many canaries"""
CLIENT = "canaries"
TENSORS = ("one", "other")
NUM_PARTIES = 2
"""Of a sum with noise in shares, the fewest there can be; one of them is the adversary."""
LEAST_NOISE = 0.3
"""That the accountant is asked about: of less, its exact numbers take minutes."""

Release = Callable[[np.ndarray, int], np.ndarray]
"""What a mechanism makes of the updates [canaries, 2, d] of two tensors, in clip norms, of a round: their noisy sum
[2, d], in clip norms. Who does not take part has an update of zero."""


@dataclass(frozen=True)
class Promise:
    """What a run says of its noise."""

    mechanism: str
    noise_multiplier: float
    epsilon: float
    """The accountant's, of the whole run"""
    spent: Callable[[float], float]
    """What that would be with noise of another multiplier; no upper bound, where the accountant's is one"""


@dataclass(frozen=True)
class MechanismAudit:
    """What the adversary found out."""

    mechanism: str
    noise_multiplier: float
    """Promised"""
    found_noise: float | None
    """The noise is this at most, with `CONFIDENCE`; None: nothing was found out."""
    epsilon: float
    """The accountant's, of the run"""
    found_epsilon: float
    """The accountant's with the noise that was found: the run's true epsilon is this at least."""
    one_run_epsilon: float
    """A lower bound without assumptions, at `DELTA`, of the canaries' own coordinates in `NUM_ROUNDS` rounds"""
    one_run_accountant: float
    """The accountant's of these"""

    @property
    def holds(self) -> bool:
        """Whether nothing contradicts what is promised."""
        enough = self.found_noise is None or self.found_noise >= self.noise_multiplier
        return enough and self.one_run_epsilon <= self.one_run_accountant

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "holds": self.holds}


def audit_mechanism(config: RunConfig, sizes: Mapping[str, int]) -> MechanismAudit | None:
    """Attack the noise of a run whose clients have so many rows; None: it adds none."""
    make: Callable[[int], Release]
    if (mechanism := Mechanism.of(config, len(sizes))) is not None:
        promise = central_promise(mechanism)
        make = lambda seed: central_release(mechanism, lambda index: derive_rng(seed, index).standard_normal)
        if mechanism.is_distributed:
            promise = parties_promise(mechanism, most_rounds(config, sizes))
            make = lambda seed: shares_release(config, mechanism, Draws(seed))
    elif (own := OwnPrivacy.of(config, max(sizes.values()))) is not None:
        promise = own_promise(own)
        make = lambda seed: rows_release(own, Draws(seed))
        if own.mechanism == "local":
            make = lambda seed: local_release(config, own, Draws(seed))
    else:
        return None
    # The run's seed the adversary knows, that of the noise it does not; what draws are the same in spite of it, it has.
    secret, public = (derive_seed(config.seed, *purpose) for purpose in (("audit", "noise"), ("privacy",)))
    return attack(make(secret), promise, config.seed, make(public))


def central_promise(mechanism: Mechanism) -> Promise:
    """Return what is promised of the noise on the updates."""
    ratio = mechanism.noise_multiplier / mechanism.update_noise  # the rest hides how many were clipped
    rounds, delta = mechanism.num_affordable, mechanism.delta
    spent = lambda noise: spent_epsilon(noise * ratio, mechanism.share, rounds, delta)
    return Promise(mechanism.config.mechanism, mechanism.update_noise, mechanism.spent(rounds), spent)


def parties_promise(mechanism: Mechanism, rounds: int) -> Promise:
    """Return what is promised against the server and the parties, who know which `rounds` a client takes part in."""
    noise, delta = mechanism.noise_multiplier, mechanism.delta
    spent = lambda found: spent_epsilon(found, 1.0, rounds, delta)
    return Promise(mechanism.config.mechanism, noise, mechanism.spent_against_parties(rounds), spent)


def own_promise(own: OwnPrivacy) -> Promise:
    """Return what a client's own noise promises it."""
    factor = 1.0 if own.mechanism == "dp-sgd" else 0.5
    steps = own.steps_per_tuning * own.num_tunings
    spent = lambda noise: spent_epsilon(factor * noise, own.share, steps, own.delta)
    return Promise(own.mechanism, own.noise_multiplier, own.spent(own.num_tunings), spent)


def attack(release: Release, promise: Promise, seed: int, public: Release | None = None) -> MechanismAudit:
    """Let the adversary guess the coins of `NUM_CANARIES` canaries; `public` draws what noise it can draw itself."""
    share = min(MOST_SHARE, SHIFT * promise.noise_multiplier / math.sqrt(NUM_ROUNDS))
    coins = derive_rng(seed, "audit", "coins").random((NUM_RUNS, NUM_CANARIES)) < 0.5
    signs = (-1.0) ** np.arange(NUM_ROUNDS)
    scores = list[list[np.ndarray]]()
    for run, included in enumerate(coins):
        own, other = run % 2, 1 - run % 2
        updates = np.zeros((NUM_CANARIES, 2, 2 * NUM_CANARIES + 1), dtype=np.float32)
        updates[np.arange(NUM_CANARIES), own, np.arange(NUM_CANARIES)] = TOO_LONG * share
        updates[:, other, -1] = TOO_LONG * math.sqrt(1 - share**2)
        updates[~included] = 0
        rounds = range(run * NUM_ROUNDS, (run + 1) * NUM_ROUNDS)
        sums = [release(sign * updates, index)[:, :-1] for index, sign in zip(rounds, signs, strict=True)]
        sums, beside = (np.stack([each[tensor] for each in sums]) for tensor in (own, other))
        views = [sums, _without(sums, beside)]
        if public is not None:
            nothing = np.zeros_like(updates)
            views.append(_without(sums, np.stack([public(nothing, index)[own, :-1] for index in rounds])))
        scores.append([_matched(view, signs) for view in views])
    return _judge(promise, share, [np.concatenate(each) for each in zip(*scores, strict=True)], coins.flatten())


def _judge(promise: Promise, share: float, scores: Sequence[np.ndarray], included: np.ndarray) -> MechanismAudit:
    """Return what the scores of some adversaries prove of canaries with `share` of their norm for themselves."""
    promised = promise.noise_multiplier
    shift = max(_refuted_shift(each, included, (1 - CONFIDENCE) / len(scores)) for each in scores)
    found = share * math.sqrt(NUM_ROUNDS) / shift if shift > 0 else None
    least = max(promised / 2, min(promised, LEAST_NOISE))  # less noise costs more still
    return MechanismAudit(
        promise.mechanism,
        promised,
        found,
        promise.epsilon,
        0.0 if found is None else promise.spent(max(found, least)),
        empirical_epsilon(scores, included, DELTA, CONFIDENCE).epsilon,
        spent_epsilon(promised / share, 1.0, NUM_ROUNDS, DELTA),
    )


def _matched(sums: np.ndarray, signs: np.ndarray) -> np.ndarray:
    """Return each canary's score [m], best for noise that goes together from round to round as in the empty half."""
    canaries, empty = np.split(sums, 2, axis=1)
    covariance = empty @ empty.T / empty.shape[1]
    covariance += (1e-9 * np.trace(covariance) / len(signs) + 1e-30) * np.eye(len(signs))
    score = np.linalg.solve(covariance, signs) @ canaries
    return score / max(float(np.abs(score).mean()), 1e-30)


def _without(sums: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Return the sums without what follows from numbers that are known, as far as the empty half does."""
    empty, known = (np.split(each, 2, axis=1)[1] for each in (sums, drawn))
    factors = (empty * known).sum(axis=1) / np.maximum((known**2).sum(axis=1), 1e-30)
    return sums - factors[:, None] * drawn


def _refuted_shift(scores: np.ndarray, included: np.ndarray, chance: float) -> float:
    """Return the largest shift of two normal distributions whose trade-off the errors at the median refute."""
    threshold = np.median(scores)
    false, missed = int((scores[~included] > threshold).sum()), int((scores[included] <= threshold).sum())
    most_false = share_interval(false, int((~included).sum()), 1 - chance)[1]  # one end of each of two intervals
    most_missed = share_interval(missed, int(included.sum()), 1 - chance)[1]
    if max(most_false, most_missed) >= 1:
        return 0.0
    return max(0.0, -NormalDist().inv_cdf(most_false) - NormalDist().inv_cdf(most_missed))


# ------------------------------------------------------------------------------------------------- what is attacked


def central_release(mechanism: Mechanism, noise: Callable[[int], Noise]) -> Release:
    """Return what the server makes of a round's updates."""
    clip_norm = mechanism.config.clip_norm

    def release(updates: np.ndarray, round_index: int) -> np.ndarray:
        sent = [_adapter(update * clip_norm) for update in updates if update.any()]
        empty = _adapter(np.zeros_like(updates[0]))
        came = (ClientUpdate(str(index), each, 1, 1, 0.0, 1) for index, each in enumerate(sent))
        mean, _ = mechanism.mean(empty, empty.tensors, came, clip_norm, noise(round_index))
        sums = torch.stack([mean.update.tensors[name] for name in TENSORS])
        return sums.double().numpy() * mechanism.expected_size / clip_norm

    return release


def shares_release(config: RunConfig, mechanism: Mechanism, draws: Draws) -> Release:
    """Return the sum of as few parties as can be that clip and add shares of the noise, but for the adversary's."""

    def release(updates: np.ndarray, round_index: int) -> np.ndarray:
        encoding = Encoding.of(config, len(updates), mechanism.noise_multiplier)
        shapes = {name: torch.Size(updates.shape[2:]) for name in TENSORS}
        sums = np.zeros(updates[0].size, "<u4")
        for party in range(NUM_PARTIES):
            total = PartySum(encoding, shapes)
            for update in updates[party::NUM_PARTIES]:
                if update.any():
                    total.add(ClientUpdate(CLIENT, _adapter(update * encoding.clip_norm), 1, 1, 0.0, 1))
            if party:
                numbers = itertools.count()
                total.add_noise(
                    NUM_PARTIES, lambda size, p=party, n=numbers: draws.uniform(size, round_index, p, next(n))
                )
            sums += total.numbers
        return sums.view("<i4").reshape(updates.shape[1:]) * (encoding.step / encoding.clip_norm)

    return release


def rows_release(own: OwnPrivacy, draws: Draws) -> Release:
    """Return what a client's step of DP-SGD makes of its rows' gradients; a run's rounds are steps of one tuning."""
    privacy = RowPrivacy(own.clip_norm, own.noise_multiplier, own.share, draws, own.num_expected)
    rows = _Rows()
    stack = PrivateStack(cast(StackedModel, rows), cast(StackedModel, rows), (CLIENT,))

    def release(gradients: np.ndarray, step: int) -> np.ndarray:
        flat = gradients.reshape(len(gradients), -1)
        rows.gradients, rows.start, rows.num_taken = torch.from_numpy(flat * own.clip_norm).float(), 0, 0
        if step % NUM_ROUNDS == 0:
            stack.start(0, privacy, CLIENT, step, Adapter({CLIENT: rows.parameters[0]}, 1, 1.0))
        stack.begin_step({0})
        while rows.more(stack.max_rows):
            stack.add_rows([0] * rows.num_taken)
        sums = stack.take_gradients()[0].double().numpy() * own.num_expected / own.clip_norm
        return sums.reshape(gradients.shape[1:])

    return release


def local_release(config: RunConfig, own: OwnPrivacy, draws: Draws) -> Release:
    """Return the numbers of what each client sends, of either tensor: its canary's, and one that is empty."""
    nobody: Any = None
    engine = Simulation(config, nobody, {}, cast(ClientStore, nobody), draws=draws)

    def release(updates: np.ndarray, round_index: int) -> np.ndarray:
        num = len(updates)
        sums = np.zeros(updates.shape[1:])
        for index, update in enumerate(updates * own.clip_norm):
            sent = _adapter(update[:, [index, num + index, -1]]).tensors
            noisy = engine._noisy(sent, own, str(index), round_index)
            sums[:, [index, num + index]] = torch.stack([noisy[name][:2] for name in TENSORS]).numpy() / own.clip_norm
        return sums

    return release


def _adapter(update: np.ndarray) -> Adapter:
    return Adapter(dict(zip(TENSORS, torch.from_numpy(update).float(), strict=True)), 1, 1.0)


class _Rows:
    """Stands for a model of one slot whose rows' gradients are given."""

    num_slots = 1

    def __init__(self) -> None:
        self.num_parameters = 2 * (2 * NUM_CANARIES + 1)
        self.parameters = torch.zeros(1, self.num_parameters)
        self.gradients = torch.zeros(0, self.num_parameters)
        self.start = self.num_taken = 0

    def collect_by_row(self, num_rows: int, trained: object) -> None:
        """Nothing is to be prepared."""

    def columns(self, factors: object) -> slice:
        return slice(None)

    def flat(self, tensors: Mapping[str, Tensor], rank: int) -> Tensor:
        return tensors[CLIENT]

    def more(self, most: int) -> bool:
        """Go on to the next rows, `most` at most; tell whether there are some."""
        self.start += self.num_taken
        self.num_taken = min(most, len(self.gradients) - self.start)
        return self.num_taken > 0

    def take_gradients(self, rows: slice) -> Tensor:
        return self.gradients[self.start : self.start + self.num_taken].clone()
