"""The server's side of the protocol: it passes on what parties send each other, adds up, and takes the masks off.

Each method takes the answers to one exchange, and returns the requests of the next, by party. Whoever is missing in
the answers, or answers nonsense, is lost to the round. A round that fewer than the threshold are left of is over.
"""

from __future__ import annotations

import itertools
import string
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedit.config.privacy import threshold_of
from fedit.interfaces import RoundError
from fedit.secure import shamir
from fedit.secure.encoding import COUNTS
from fedit.secure.masks import add_masks, context, public_bytes
from fedit.secure.party import Words, has_signed, has_signed_keys, mask_key, seed_key, signed_survivors

Answers = Mapping[str, Any]
KEY_BYTES = {"cipher": 32, "mask": 32, "seed": 32, "identity": 32, "signature": 64}
MOST_TRIES = 1000
"""Choices of shares that a secret is looked for in"""


class Collector:
    """One round's sum."""

    def __init__(
        self, session: str, parties: Sequence[str], share: float, num_numbers: int, run: str, task: str
    ) -> None:
        """Begin a round of `parties`; their sums have `num_numbers` numbers. `run` and `task` name what is asked."""
        self._session, self._run, self._task = session, run, task
        self._asked = list(parties)
        self._threshold = threshold_of(share, len(parties))
        self._share = share
        self._keys: dict[str, Words] = {}
        self._sharing: list[str] = []
        """Who sent shares"""
        self._survivors: list[str] = []
        """Who sent a masked sum"""
        self._counts = np.zeros(len(COUNTS), "<u8")
        self._numbers = np.zeros(num_numbers, "<u4")

    def begin(self) -> dict[str, Words]:
        return {party: self._words("keys") for party in self._asked}

    def keys(self, answers: Answers) -> dict[str, Words]:
        """Take the parties' public keys; return what asks for shares."""
        for party in sorted(set(self._asked) & answers.keys()):
            keys = answers[party]
            whole = _has(keys, KEY_BYTES) and all(_is_hex(keys[name], size) for name, size in KEY_BYTES.items())
            if whole and has_signed_keys(self._run, self._session, party, keys):
                self._keys[party] = {name: keys[name] for name in KEY_BYTES}
        self._enough(self._keys, "keys")
        self._threshold = threshold_of(self._share, len(self._keys))
        return {party: self._words("shares") | {"keys": self._keys} for party in self._keys}

    def shares(self, answers: Answers) -> dict[str, Words]:
        """Take the shares; return what asks for masked sums."""
        self._sharing = [
            party
            for party in self._keys
            if _has(answers.get(party), {"shares"}) and _are_hex(answers[party]["shares"], self._keys.keys() - {party})
        ]
        self._enough(self._sharing, "shares")
        return {
            party: self._words("mask")
            | {"shares": {other: answers[other]["shares"][party] for other in self._sharing if other != party}}
            for party in self._sharing
        }

    def add(self, party: str, payload: bytes | bytearray | memoryview) -> bool:
        """Add a party's masked sum, if it can be one; tell whether."""
        if party not in self._sharing or party in self._survivors:
            return False
        if len(payload) != self._counts.nbytes + self._numbers.nbytes:
            return False
        self._counts += np.frombuffer(payload, "<u8", len(self._counts))
        self._numbers += np.frombuffer(payload, "<u4", len(self._numbers), self._counts.nbytes)
        self._survivors.append(party)
        return True

    def confirm(self) -> dict[str, Words]:
        """Return what asks the parties whose sums are here to confirm that."""
        self._survivors.sort()
        self._enough(self._survivors, "masked sums")
        return {party: self._words("confirm") | {"survivors": self._survivors} for party in self._survivors}

    def unmask(self, answers: Answers) -> dict[str, Words]:
        """Take the confirmations; return what asks for shares of the secrets that take the masks off."""
        statement = signed_survivors(self._session, self._keys, self._task, self._survivors)
        signatures = {
            party: answers[party]["signature"]
            for party in self._survivors
            if _has(answers.get(party), {"signature"})
            and has_signed(self._keys[party]["identity"], str(answers[party]["signature"]), statement)
        }
        self._enough(signatures, "confirmations")
        return {party: self._words("unmask") | {"signatures": signatures} for party in signatures}

    def total(self, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Take the shares of the secrets; return the counts, uint64, and the numbers, uint32, of the sum.

        Raises:
            RoundError: fewer than the threshold are left, or their shares do not fit.
        """
        lost = [party for party in self._sharing if party not in self._survivors]
        told = {
            party: words
            for party, words in answers.items()
            if party in self._survivors
            and _has(words, {"seeds", "privates"})
            and _are_hex(words["seeds"], self._survivors)
            and _are_hex(words["privates"], lost)
        }
        self._enough(told, "shares of the masks")
        plus: list[bytes] = []
        minus: list[bytes] = []
        for party in self._survivors:
            commitment = self._keys[party]["seed"]
            seed = self._secret(told, "seeds", party, lambda s, c=commitment: context("commitment", s.hex()).hex() == c)
            minus.append(seed_key(seed, self._session, party))
        for party in lost:
            public = self._keys[party]["mask"]
            private = X25519PrivateKey.from_private_bytes(
                self._secret(told, "privates", party, lambda s, p=public: _public(s) == p)
            )
            for other in self._survivors:  # who added this mask if its name comes first, or subtracted it
                theirs = bytes.fromhex(self._keys[other]["mask"])
                try:
                    key = mask_key(private, theirs, self._session, self._task, (other, party))
                except ValueError as error:
                    raise RoundError(f"secure aggregation: {other} has no public key") from error
                (minus if other < party else plus).append(key)
        add_masks((self._counts, self._numbers), plus, minus)
        return self._counts, self._numbers

    @property
    def noise_shares(self) -> float:
        """Shares of noise in the sum, of which as many as are promised are 1."""
        return len(self._survivors) / max(1, self._threshold - 1)

    def _secret(self, told: Mapping[str, Words], kind: str, party: str, fits: Callable[[bytes], bool]) -> bytes:
        """Return a party's secret of so many shares as are needed, though some of them may be wrong."""
        points = {name: index + 1 for index, name in enumerate(self._keys)}
        shares = {points[name]: bytes.fromhex(words[kind][party]) for name, words in told.items()}
        for chosen in itertools.islice(itertools.combinations(shares, self._threshold), MOST_TRIES):
            try:
                secret = shamir.join({point: shares[point] for point in chosen})
            except ValueError:
                continue
            if fits(secret):
                return secret
        raise RoundError(f"secure aggregation: the shares of a secret of {party} do not fit. The checkpoint is intact.")

    def _words(self, exchange: str) -> Words:
        return {"exchange": exchange, "session": self._session}

    def _enough(self, got: Collection[str], what: str) -> None:
        if len(got) < self._threshold:
            raise RoundError(
                f"secure aggregation got {what} of {len(got)} of {len(self._asked)} parties, and needs "
                f"{self._threshold}. The checkpoint of the round before is intact."
            )


def _public(private: bytes) -> str:
    return public_bytes(X25519PrivateKey.from_private_bytes(private)).hex()


def _has(words: Any, names: Collection[str]) -> bool:
    return isinstance(words, dict) and words.keys() >= set(names)


def _are_hex(words: Any, names: Collection[str]) -> bool:
    return isinstance(words, dict) and words.keys() == set(names) and all(map(_is_hex, words.values()))


def _is_hex(word: Any, num_bytes: int | None = None) -> bool:
    is_hex = isinstance(word, str) and len(word) % 2 == 0 and set(word) <= set(string.hexdigits)
    return is_hex and (num_bytes is None or len(word) == 2 * num_bytes)
