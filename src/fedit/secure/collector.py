"""The server's side of the protocol: it passes on what parties send each other, adds up, and takes the masks off.

Each method takes the answers to one exchange, and returns the requests of the next, by party. Whoever is missing in
the answers is lost to the round. A round that fewer than the threshold are left of is over.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedit.interfaces import RoundError
from fedit.secure import shamir
from fedit.secure.encoding import COUNTS
from fedit.secure.masks import add_masks, context, public_bytes
from fedit.secure.party import Words, mask_key, seed_key, threshold_of

Answers = Mapping[str, Words]


class Collector:
    """One round's sum."""

    def __init__(self, session: str, parties: Sequence[str], share: float, num_numbers: int) -> None:
        """Begin the round of so many `parties`; a sum has `num_numbers` numbers."""
        self._session = session
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
        self._keys = {party: dict(answers[party]) for party in sorted(answers)}
        self._enough(len(self._keys), "keys")
        self._threshold = threshold_of(self._share, len(self._keys))
        return {party: self._words("shares") | {"keys": self._keys} for party in self._keys}

    def shares(self, answers: Answers) -> dict[str, Words]:
        """Take the shares; return what asks for masked sums."""
        self._sharing = [party for party in self._keys if party in answers]
        self._enough(len(self._sharing), "shares")
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
        self._enough(len(self._survivors), "masked sums")
        return {party: self._words("confirm") | {"survivors": self._survivors} for party in self._survivors}

    def unmask(self, answers: Answers) -> dict[str, Words]:
        """Take the confirmations; return what asks for shares of the secrets that take the masks off."""
        self._enough(len(answers), "confirmations")
        signatures = {party: answers[party]["signature"] for party in self._survivors if party in answers}
        return {party: self._words("unmask") | {"signatures": signatures} for party in signatures}

    def total(self, answers: Answers) -> tuple[np.ndarray, np.ndarray]:
        """Take the shares of the secrets; return the counts, uint64, and the numbers, uint32, of the sum.

        Raises:
            RoundError: fewer than the threshold are left, or their shares do not fit.
        """
        self._enough(len(answers), "shares of the masks")
        plus: list[bytes] = []
        minus: list[bytes] = []
        for party in self._survivors:
            seed = self._joined(answers, "seeds", party)
            if context("commitment", seed.hex()).hex() != self._keys[party]["seed"]:
                raise RoundError(f"secure aggregation: the shares of the seed of {party} do not fit")
            minus.append(seed_key(seed, self._session, party))
        for lost in (party for party in self._sharing if party not in self._survivors):
            private = X25519PrivateKey.from_private_bytes(self._joined(answers, "privates", lost))
            if public_bytes(private).hex() != self._keys[lost]["mask"]:
                raise RoundError(f"secure aggregation: the shares of the key of {lost} do not fit")
            for party in self._survivors:  # who added this mask if its name comes first, or subtracted it
                theirs = bytes.fromhex(self._keys[party]["mask"])
                key = mask_key(private, theirs, self._session, (party, lost))
                (minus if party < lost else plus).append(key)
        add_masks((self._counts, self._numbers), plus, minus)
        return self._counts, self._numbers

    @property
    def survivors(self) -> Sequence[str]:
        return self._survivors

    def _joined(self, answers: Answers, secrets: str, party: str) -> bytes:
        points = {name: index + 1 for index, name in enumerate(self._keys)}
        try:
            shares = {points[name]: bytes.fromhex(words[secrets][party]) for name, words in answers.items()}
            return shamir.join(dict(list(shares.items())[: self._threshold]))
        except (KeyError, ValueError, TypeError) as error:
            raise RoundError(f"secure aggregation: the shares of a secret of {party} do not fit") from error

    def _words(self, exchange: str) -> Words:
        return {"exchange": exchange, "session": self._session}

    def _enough(self, got: int, what: str) -> None:
        if got < self._threshold:
            raise RoundError(
                f"secure aggregation got {what} of {got} of {len(self._asked)} parties, and needs {self._threshold}. "
                "The checkpoint of the round before is intact."
            )
