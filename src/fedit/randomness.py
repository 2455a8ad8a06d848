"""Random numbers of a run: every purpose has a generator of its own, which follows from the run's seed."""

from __future__ import annotations

import hashlib

import numpy as np


def derive_seed(seed: int, *purpose: str | int) -> int:
    """Return a 63-bit seed for one purpose; any change of `seed` or of a part of `purpose` gives an unrelated one."""
    text = "\x1f".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def derive_rng(seed: int, *purpose: str | int) -> np.random.Generator:
    """Return the generator of one purpose, e.g. ``derive_rng(seed, "cohort", round_index)``."""
    return np.random.default_rng(derive_seed(seed, *purpose))
