"""Privacy that a client gives itself, so that it has to trust nobody: noise in every local step, or on its update.

``dp-sgd`` (1607.00133) hides each row: a step draws every row by itself with probability q = batch_size / n, clips its
gradient to C and adds noise of z C to the sum. Neighbours differ by one row that is there or not; how many rows a
client has is taken to be public, since q, the noise and what is left of a budget follow from it.

``local`` hides all that the client holds: its update is clipped to C, and noise of z C added. Neighbours are any two
sets of rows, which move the update by 2 C at most, so that z counts half.

What the server does with such updates costs nothing more. What is spent is accounted for at the client, by how often it
was tuned: by Renyi divergences, which are an upper bound and fast where there are many steps.
"""

from __future__ import annotations

import bisect
from dataclasses import dataclass
from typing import Any

from fedit.accounting import accountant, noise_for, spent_epsilon
from fedit.config import RunConfig
from fedit.interfaces import ConfigError

BY_ROW = "one row added or removed, how many there are being public"
USED_UP = "its privacy budget is used up"
"""Why a client returns nothing any more"""


@dataclass(frozen=True)
class OwnPrivacy:
    """One client's noise, and what its tunings spend."""

    mechanism: str
    num_examples: int
    share: float
    """q"""
    steps_per_tuning: int
    """Noisy ones"""
    num_tunings: int
    """Planned: the client may be in every round's cohort"""
    delta: float
    clip_norm: float
    noise_multiplier: float
    budget: float | None

    @classmethod
    def of(cls, run: RunConfig, num_examples: int) -> OwnPrivacy | None:
        """Return the privacy of a client with so many rows; None where it adds no noise itself.

        Raises:
            ConfigError: what is asked for cannot be had.
        """
        privacy = run.privacy
        if privacy is None or not privacy.at_clients:
            return None
        is_by_row = privacy.mechanism == "dp-sgd"
        delta = num_examples**-1.1 if privacy.delta is None else privacy.delta
        if not 0 < delta < 1 or (is_by_row and delta >= 1 / num_examples):
            raise ConfigError(
                f"[privacy] delta = {delta:g} allows to give one of {num_examples} rows of a client away altogether. "
                f"It has to be below 1/{num_examples}."
            )
        share = min(1.0, run.client.batch_size / num_examples) if is_by_row else 1.0
        steps = run.client.num_steps(num_examples) if is_by_row else 1
        noise = privacy.noise_multiplier
        if noise is None:
            assert privacy.target_epsilon is not None
            noise = noise_for(privacy.target_epsilon, share, steps * run.rounds, delta, tight=False)
            noise *= 1.0 if is_by_row else 2.0
        budget = privacy.target_epsilon
        made = cls(privacy.mechanism, num_examples, share, steps, run.rounds, delta, privacy.clip_norm, noise, budget)
        if made.exhausted(0):
            raise ConfigError(
                f"[privacy] noise_multiplier = {noise:g} costs a client of {num_examples} rows an epsilon of "
                f"{made.spent(1):.2f} in its first round, more than target_epsilon = {budget:g}. Raise one of them."
            )
        return made

    @staticmethod
    def announcement(run: RunConfig) -> dict[str, Any] | None:
        """Return what a real run says of privacy that its clients give themselves; None: they give none."""
        privacy = run.privacy
        if privacy is None or not privacy.at_clients:
            return None
        is_by_row = privacy.mechanism == "dp-sgd"
        return {
            "epsilon": privacy.target_epsilon,
            "delta": privacy.delta,
            "unit": "one row of a client" if is_by_row else "all rows of a client",
            "adjacency": "as each client's log says",
            "sampling": "of rows, at each client" if is_by_row else "none is counted on",
            "rounds": run.rounds,
            "noise_multiplier": privacy.noise_multiplier,
            "clip_norm": privacy.clip_norm,
            "clipping": "fixed, of each row's gradient" if is_by_row else "fixed, of the whole update",
            "trust": "nobody: the client adds the noise",
            "accountant": accountant(tight=False),
            "noise": "the operating system's, at each client",
        }

    @property
    def num_expected(self) -> float:
        """Q n: the rows of a step."""
        return self.share * self.num_examples

    def spent(self, num_tunings: int) -> float:
        """Return the epsilon of so many tunings."""
        noise = self.noise_multiplier if self.mechanism == "dp-sgd" else self.noise_multiplier / 2
        return spent_epsilon(noise, self.share, self.steps_per_tuning * num_tunings, self.delta, tight=False)

    def exhausted(self, num_tunings: int) -> bool:
        """Tell whether one more tuning than `num_tunings` would exceed the budget."""
        return self.budget is not None and self.spent(num_tunings + 1) > self.budget * (1 + 1e-9)

    def statement(self, noise: str) -> dict[str, Any]:
        """Return what is promised to this client; `noise` says where the noise is from."""
        affordable = self.num_tunings
        if self.exhausted(affordable - 1):
            affordable = bisect.bisect_left(range(affordable), True, key=self.exhausted)
        is_by_row = self.mechanism == "dp-sgd"
        return {
            "epsilon": self.spent(affordable),
            "delta": self.delta,
            "unit": "one row of a client" if is_by_row else "all rows of a client",
            "adjacency": BY_ROW if is_by_row else "the client's rows replaced by any others",
            "sampling": f"Poisson, probability {self.share:.3g} a step" if is_by_row else "none is counted on",
            "rounds": affordable,
            "noise_multiplier": self.noise_multiplier,
            "clip_norm": self.clip_norm,
            "clipping": "fixed, of each row's gradient" if is_by_row else "fixed, of the whole update",
            "trust": "nobody: the client adds the noise",
            "accountant": accountant(tight=False),
            "noise": noise,
        }
