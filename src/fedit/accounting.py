"""How much privacy a Gaussian mechanism on Poisson-sampled clients spends: by the ``dp-accounting`` library.

Privacy loss distributions (2106.02848) are composed numerically, which is tight: Renyi accounting asks for some 10%
more noise. Neighbours differ by one client that is there or not.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from types import ModuleType
from typing import Any

from fedit.errors import ConfigError

SMALLEST, LARGEST = 0.3, 10_000.0
"""Noise multipliers that are searched"""
ORDERS = [*(order / 4 for order in range(8, 44)), *range(11, 64), *range(64, 257, 8)]
"""Of Renyi divergences"""
TOLERANCE = 1e-3
"""Of the one that is found, relative; it is never too small."""


def accountant(*, tight: bool = True) -> str:
    """Return the accountant's name and version."""
    _library()
    method = "privacy loss distributions" if tight else "Renyi divergences"
    return f"dp-accounting {importlib.metadata.version('dp-accounting')}, {method}"


@functools.cache
def spent_epsilon(noise_multiplier: float, share: float, num_rounds: int, delta: float, *, tight: bool = True) -> float:
    """Return the epsilon of so many rounds that sample each client with probability `share`; 0 of no round.

    Not `tight`, it is a bound by Renyi divergences, some 10% more and at once.

    Raises:
        ConfigError: the accountant is not installed.
    """
    if num_rounds == 0:
        return 0.0
    _library()
    from dp_accounting import pld, rdp

    account = pld.PLDAccountant() if tight else rdp.RdpAccountant(ORDERS)
    return _epsilon(account, noise_multiplier, share, num_rounds, delta)


@functools.cache
def noise_for(target_epsilon: float, share: float, num_rounds: int, delta: float, *, tight: bool = True) -> float:
    """Return the smallest noise multiplier with which the rounds spend at most `target_epsilon`.

    Raises:
        ConfigError: no noise is enough, or the accountant is not installed.
    """

    def bound(noise: float) -> float:
        return spent_epsilon(noise, share, num_rounds, delta, tight=False)

    def exact(noise: float) -> float:
        return spent_epsilon(noise, share, num_rounds, delta)

    high = 0.5
    while bound(high) > target_epsilon:
        high *= 2
        if high > LARGEST:
            raise ConfigError(
                f"[privacy] target_epsilon = {target_epsilon:g} is out of reach in {num_rounds} rounds with delta = "
                f"{delta:.2g}. Raise it, or run fewer rounds."
            )
    high = _on_target(bound, target_epsilon, SMALLEST, high)
    if not tight:
        return high
    low = 0.75 * high
    return _on_target(exact, target_epsilon, low if exact(low) > target_epsilon else SMALLEST, high)


def _on_target(epsilon: Callable[[float], float], target: float, low: float, high: float) -> float:
    """Return the noise between `low` and `high`, which is enough, by which `epsilon` is on target, or a bit below."""
    from scipy.optimize import brentq

    if epsilon(low) <= target:
        return low
    slack = TOLERANCE * high / 2
    found: Any = brentq(lambda noise: epsilon(noise) - target, low, high, xtol=slack)
    return min(high, float(found) + slack)


def _epsilon(accountant: Any, noise_multiplier: float, share: float, num_rounds: int, delta: float) -> float:
    import dp_accounting

    event = dp_accounting.GaussianDpEvent(noise_multiplier)
    if share < 1:
        event = dp_accounting.PoissonSampledDpEvent(share, event)
    accountant.compose(event, num_rounds)
    return float(accountant.get_epsilon(delta))


def _library() -> ModuleType:
    try:
        import dp_accounting
    except ModuleNotFoundError as error:
        raise ConfigError(
            "[privacy] needs the accountant, which is not installed: pip install 'fedit[privacy]'"
        ) from error
    return dp_accounting
