"""Client-level differential privacy of the global adapter: clip, add up, add noise (DP-FedAvg, 1710.06963).

With q the probability that a round samples a client, N clients, C the clip norm and z the noise multiplier, what a
round makes of the updates u_k of its cohort is

    ( sum_k u_k min(1, C / ||u_k||) + N(0, (z C)^2 I) ) / (q N)

The denominator does not depend on who came: a client that is added or removed moves the sum by C at most. All that the
rounds do with this mean costs no more privacy.

*central*: the server sees single updates, clips them and adds the noise; it is trusted to forget them. *distributed*:
the clients clip and add shares of the noise, of variance (z C)^2 at least, and the server sees the sum alone
(`fedit.secure`). It adds what shares of lost parties leave to a variance that is the same in all rounds, or the noise
would tell how many came. Neighbours differ by a client that sends zero in place of its update. The server and the other
parties know who was asked, so that against them sampling hides nobody.
"""

from __future__ import annotations

import bisect
import functools
import math
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedit.accounting import accountant, noise_for, spent_epsilon
from fedit.config import PrivacyConfig, RunConfig
from fedit.interfaces import Adapter, ClientUpdate, ConfigError, derive_rng

if TYPE_CHECKING:
    from torch import Tensor

Noise = Callable[[tuple[int, ...]], np.ndarray]
"""Draws standard normal numbers, float64, of a shape"""


@dataclass(frozen=True)
class Mechanism:
    """The noise of a run's rounds, and what they spend."""

    config: PrivacyConfig
    num_clients: int
    share: float
    """The probability that a round samples a client"""
    num_rounds: int
    delta: float
    noise_multiplier: float
    variance: float = 1.0
    """Of the noise on a sum, in (z C)^2: more than what is promised, where lost parties' shares are made up for"""

    @property
    def is_distributed(self) -> bool:
        """Whether updates come as the sum of clients that have clipped them and added the noise."""
        return self.config.mechanism == "distributed"

    @classmethod
    def of(cls, run: RunConfig, num_clients: int) -> Mechanism | None:
        """Return the mechanism of a run with so many clients; None where it has none.

        Raises:
            ConfigError: the privacy that it asks for cannot be had.
        """
        privacy = run.privacy
        if privacy is None or privacy.at_clients:
            return None
        delta = num_clients**-1.1 if privacy.delta is None else privacy.delta
        if not 0 < delta < min(1.0, 1 / num_clients):
            raise ConfigError(
                f"[privacy] delta = {delta:g} allows to give one of {num_clients} clients away altogether. It has to "
                f"be below 1/{num_clients}."
            )
        share = run.cohort.expected_share(num_clients)
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.target_epsilon is not None
            noise = noise_for(privacy.target_epsilon, share, run.rounds, delta)
        variance = 1.0
        if privacy.mechanism == "distributed" and (sums := run.secure_sums) is not None:
            variance = sums.most_noise
        made = cls(privacy, num_clients, share, run.rounds, delta, noise, variance)
        if not made.num_affordable:
            raise ConfigError(
                f"[privacy] noise_multiplier = {noise:g} costs an epsilon of {made.spent(1):.2f} in the first round, "
                f"more than target_epsilon = {privacy.target_epsilon:g}. Raise one of them."
            )
        return made

    @property
    def expected_size(self) -> float:
        """Of a cohort, clients."""
        return self.share * self.num_clients

    @property
    def count_noise(self) -> float:
        """Standard deviation of the noise on how many updates are within the clip norm (a twentieth of a cohort, as in
        1905.03871, but not so little that it would take most of the budget).
        """
        return max(self.expected_size / 20, self.noise_multiplier)

    @property
    def update_noise(self) -> float:
        """What is left of the noise multiplier for the updates, where the count needs some too: larger."""
        if self.config.clip_quantile is None:
            return self.noise_multiplier
        return (self.noise_multiplier**-2 - (2 * self.count_noise) ** -2) ** -0.5

    def spent(self, num_rounds: int) -> float:
        """Return the epsilon of so many rounds."""
        return spent_epsilon(self.noise_multiplier, self.share, num_rounds, self.delta)

    def exhausted(self, num_rounds: int) -> bool:
        """Tell whether one more round than `num_rounds` would exceed the budget."""
        return num_rounds >= self.num_affordable

    @functools.cached_property
    def num_affordable(self) -> int:
        """The rounds that the budget allows, as many as are planned at most."""
        budget = self.config.target_epsilon
        if budget is None or self.config.noise_multiplier is None:
            return self.num_rounds  # the noise was made for it
        return bisect.bisect_right(range(1, self.num_rounds + 1), budget, key=self.spent)

    def spent_against_parties(self, num_rounds: int) -> float:
        """Return the epsilon of so many rounds that a client takes part in, for who knows in which."""
        return spent_epsilon(self.noise_multiplier, 1.0, num_rounds, self.delta)

    def statement(self, noise: str, most_rounds: int) -> dict[str, Any]:
        """Return what is promised, in words and numbers that can be cited; `noise` says where the noise is from, and
        `most_rounds` in how many rounds the client takes part that is in most.
        """
        adjacency, trust = "one client added or removed", "the server sees single updates and adds the noise"
        if self.is_distributed:
            adjacency = "one client's update replaced by zero"
            trust = (
                "the server sees the noisy sums of rounds alone. It and the other parties know who is in them: against "
                f"them epsilon is {self.spent_against_parties(most_rounds):.3g}, of {most_rounds} rounds of one client"
            )
        return {
            "epsilon": self.spent(self.num_affordable),
            "delta": self.delta,
            "unit": "all rows of a client",
            "adjacency": adjacency,
            "sampling": f"Poisson, probability {self.share:g} a round",
            "rounds": self.num_affordable,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.config.clip_norm,
            "clipping": "fixed" if self.config.clip_quantile is None else f"quantile {self.config.clip_quantile:g}",
            "trust": trust,
            "accountant": accountant(),
            "noise": noise,
        }

    def mean(
        self,
        adapter: Adapter,
        shapes: Mapping[str, Tensor],
        updates: Iterable[ClientUpdate],
        clip_norm: float,
        noise: Noise,
    ) -> tuple[ClientUpdate, float]:
        """Consume a round's updates, and return their noisy mean, as the update of one client, and the next clip norm.

        `shapes` are the tensors that clients share; where nobody came it is all noise. To the mean of clients that have
        clipped and added noise themselves what is missing to `variance` is added.
        """
        sums = {name: torch.zeros_like(tensor, dtype=torch.float64) for name, tensor in shapes.items()}
        within, missing = 0.0, self.variance
        for result in updates:
            if self.is_distributed:
                for name, tensor in result.update.tensors.items():
                    sums[name] += tensor.double() * (1 + len(result.others))
                missing = max(0.0, self.variance - result.noise_shares)
                continue
            clipped, norm = clip(result.update.tensors, clip_norm)
            within += 0.5 if norm <= clip_norm else -0.5
            for name, tensor in clipped.items():
                sums[name] += tensor
        for tensor in sums.values():
            deviation = self.update_noise * clip_norm * math.sqrt(missing)
            tensor += torch.from_numpy(noise(tuple(tensor.shape))) * deviation
            tensor /= self.expected_size
        update = ClientUpdate("noisy mean", adapter.with_tensors(sums), 1, 0, 0.0, 1)
        if (quantile := self.config.clip_quantile) is None:
            return update, clip_norm
        noisy = within + self.count_noise * float(noise((1,))[0])
        share_within = noisy / self.expected_size + 0.5
        return update, clip_norm * math.exp(-self.config.clip_rate * (share_within - quantile))


def clip(tensors: Mapping[str, Tensor], bound: float) -> tuple[dict[str, Tensor], float]:
    """Return tensors, float64, scaled together to an L2 norm of `bound` at most, and the norm that they had."""
    norm = math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))
    factor = min(1.0, bound / norm) if norm else 1.0
    return {name: tensor.double() * factor for name, tensor in tensors.items()}, norm


class Draws:
    """Random numbers for the privacy of rows: by a seed, for who simulates, or the operating system's."""

    def __init__(self, seed: int | None) -> None:
        """Draw by `seed`; None: what nobody can repeat."""
        self._seed = seed

    @property
    def repeatable(self) -> bool:
        """Whether the same purpose gives the same numbers again."""
        return self._seed is not None

    def uniform(self, size: int, *purpose: str | int) -> np.ndarray:
        """Return numbers in [0, 1), float64 [size]."""
        if self._seed is None:
            return (np.frombuffer(os.urandom(8 * size), dtype="<u8") >> np.uint64(11)) * 2.0**-53
        return derive_rng(self._seed, "uniform", *purpose).random(size)

    def normal(self, shape: tuple[int, ...], *purpose: str | int) -> np.ndarray:
        """Return standard normal numbers, float64."""
        if self._seed is None:
            return system_noise(shape)
        return derive_rng(self._seed, "normal", *purpose).standard_normal(shape)


def system_noise(shape: tuple[int, ...]) -> np.ndarray:
    """Draw standard normal numbers from the operating system's random bytes, which nobody can repeat.

    Each is the sum of four, halved, by Box and Muller's transform: the rounding of one alone tells which numbers can
    have been noise, and which cannot (2107.10138).
    """
    size = math.prod(shape)
    total = np.zeros(size)
    for _ in range(4):
        bits = np.frombuffer(os.urandom(16 * size), dtype="<u8").reshape(2, size) >> np.uint64(11)
        radius = np.sqrt(-2 * np.log((bits[0] + 1.0) * 2.0**-53))
        total += radius * np.cos(2 * np.pi * 2.0**-53 * bits[1])
    return (total / 2).reshape(shape)
