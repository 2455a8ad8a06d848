"""Shamir's secret sharing (1979) of 32 bytes: any `threshold` of the shares give them back, fewer tell nothing."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence

PRIME = 2**256 + 297
"""The smallest prime above all secrets"""
SECRET_BYTES, SHARE_BYTES = 32, 33


def split(secret: bytes, points: Sequence[int], threshold: int) -> dict[int, bytes]:
    """Return a share of a secret [32 bytes] for each of the `points`, which are not 0: a random polynomial's values.

    Examples:
        >>> shares = split(b"x" * 32, [1, 2, 3], threshold=2)
        >>> join({1: shares[1], 3: shares[3]}) == b"x" * 32
        True
    """
    if len(secret) != SECRET_BYTES or not 1 <= threshold <= len(set(points)) or any(p % PRIME == 0 for p in points):
        raise ValueError("expected a secret of 32 bytes, and at least `threshold` points other than 0")
    coefficients = [int.from_bytes(secret), *(secrets.randbelow(PRIME) for _ in range(threshold - 1))]
    shares = {}
    for point in points:
        value = 0
        for coefficient in reversed(coefficients):
            value = (value * point + coefficient) % PRIME
        shares[point] = value.to_bytes(SHARE_BYTES)
    return shares


def join(shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of shares by their points: the polynomial's value at 0, by Lagrange's formula.

    Raises:
        ValueError: they are no shares of 32 bytes.
    """
    total = 0
    for point, share in shares.items():
        numerator = denominator = 1
        for other in shares:
            if other != point:
                numerator = numerator * other % PRIME
                denominator = denominator * (other - point) % PRIME
        total += int.from_bytes(share) * numerator * pow(denominator, -1, PRIME)
    secret = total % PRIME
    if secret >> (8 * SECRET_BYTES):
        raise ValueError("these shares are of no secret of 32 bytes")
    return secret.to_bytes(SECRET_BYTES)
