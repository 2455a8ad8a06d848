"""A party's side of the protocol: what it answers to each exchange, and what it refuses.

It trusts no server. It takes part with parties whose identities it knows, tells one share of each other party and never
two, and unmasks nothing that fewer than the threshold of the parties have signed.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedit.config.privacy import threshold_of
from fedit.errors import FeditError
from fedit.secure import shamir
from fedit.secure.encoding import PartySum, Uniform
from fedit.secure.masks import add_masks, agree, context, decrypt, encrypt, public_bytes

Words = dict[str, Any]
"""A message: JSON, bytes in hexadecimal"""


class MistrustError(FeditError):
    """A party does not go on with a round. The message may be told to the server."""


def signed_keys(run: str, session: str, party: str, keys: Words) -> bytes:
    """Return what a party signs of its keys: with the run's description, which has to be the same for all."""
    return context("keys", run, session, party, keys["cipher"], keys["mask"], keys["seed"])


def signed_survivors(session: str, keys: Mapping[str, Words], task: str, survivors: Sequence[str]) -> bytes:
    """Return what a party signs of those who have sent masked sums, by which all have seen the same keys and task."""
    seen = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()
    return context("survivors", session, seen, task, *survivors)


def has_signed_keys(run: str, session: str, party: str, keys: Words) -> bool:
    """Tell whether keys are signed by the identity that they name."""
    return has_signed(keys["identity"], keys["signature"], signed_keys(run, session, party, keys))


def has_signed(identity: str, signature: str, statement: bytes) -> bool:
    """Tell whether a signature is that of an identity under a statement; both in hexadecimal."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(identity)).verify(bytes.fromhex(signature), statement)
    except (InvalidSignature, ValueError):
        return False
    return True


def mask_key(own: X25519PrivateKey, other: bytes, session: str, task: str, parties: Sequence[str]) -> bytes:
    """Return the key of the mask that two parties have in common, if they were asked the same.

    Otherwise their masks do not cancel: who sends the others a model that learns nothing, or a coarser grid, would find
    one party's update in the sum (2111.07380).
    """
    return agree(own, other, context("mask", session, task, *sorted(parties)))


def seed_key(seed: bytes, session: str, party: str) -> bytes:
    """Return the key of a party's own mask."""
    return hashlib.sha256(context("seed", session, party) + seed).digest()


@dataclass(eq=False)
class _Session:
    """What a party knows in one round."""

    name: str
    cipher: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    mask: X25519PrivateKey = field(default_factory=X25519PrivateKey.generate)
    seed: bytes = field(default_factory=lambda: os.urandom(shamir.SECRET_BYTES))
    announced: Words = field(default_factory=dict)
    keys: Mapping[str, Words] = field(default_factory=dict)
    """Of all parties"""
    threshold: int = 0
    shared: Words = field(default_factory=dict)
    """The encrypted shares that it has sent, by party"""
    held: dict[str, tuple[bytes, bytes]] = field(default_factory=dict)
    """The shares of each party's seed and private key that it has, its own too"""
    task: str | None = None
    """Names what the masked sum was made of; None: there is none yet"""
    survivors: list[str] | None = None


class Party:
    """Answers the exchanges of one round at a time."""

    def __init__(
        self,
        name: str,
        identity: Ed25519PrivateKey,
        knows: Callable[[str, str], bool],
        share: float,
        min_parties: int,
        run: str,
    ) -> None:
        """Make a party of the run that the digest `run` of its description names.

        `knows` tells whether a public identity, hexadecimal, is that of the party of a name.
        """
        self.name = name
        self.run = run
        self._identity = identity
        self._knows = knows
        self._share = share
        self._min_parties = min_parties
        self._session: _Session | None = None

    def answer(self, request: Words) -> Words:
        """Return the answer to an exchange; asked the same again it is the same.

        Raises:
            MistrustError: it does not go on with this round.
        """
        exchange = str(request["exchange"])
        if exchange == "keys":
            return self._announce(str(request["session"]))
        session = self._of(request)
        answers = {"shares": self._shares, "confirm": self._confirm, "unmask": self._unmask}
        if exchange not in answers:
            raise MistrustError(f"{self.name} knows no exchange {exchange!r}")
        try:
            return answers[exchange](session, request)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise MistrustError(f"{self.name} was asked for {exchange} in words that it cannot read") from error

    def masked(self, request: Words, total: PartySum, task: str, uniform: Uniform) -> bytes:
        """Return the masked sum of the party's clients: their counts, then their numbers, little endian.

        `request` has the encrypted shares of the other parties; `task` names what they were asked to tune; noise, if
        there is any, is of `uniform`.

        Raises:
            MistrustError: it does not go on with this round.
        """
        session = self._of(request)
        if not session.shared or session.task is not None:
            raise MistrustError(f"{self.name} masks one sum in a round, once shares are exchanged")
        self._take_shares(session, request["shares"])
        session.task = task
        total.add_noise(session.threshold, uniform)
        plus, minus = [seed_key(session.seed, session.name, self.name)], []
        for other in session.held.keys() - {self.name}:
            theirs = bytes.fromhex(session.keys[other]["mask"])
            (plus if self.name < other else minus).append(
                mask_key(session.mask, theirs, session.name, task, (self.name, other))
            )
        add_masks((total.counts, total.numbers), plus, minus)
        return b"".join([total.counts.tobytes(), total.numbers.tobytes()])

    def _of(self, request: Words) -> _Session:
        if self._session is None or self._session.name != request["session"]:
            raise MistrustError(f"{self.name} has no keys of this round: it was started again, or is in another")
        return self._session

    def _announce(self, name: str) -> Words:
        if self._session is None or self._session.name != name:
            session = _Session(name)
            keys = {
                "cipher": public_bytes(session.cipher).hex(),
                "mask": public_bytes(session.mask).hex(),
                "seed": context("commitment", session.seed.hex()).hex(),
                "identity": self._identity.public_key().public_bytes_raw().hex(),
            }
            signature = self._identity.sign(signed_keys(self.run, name, self.name, keys))
            session.announced = {**keys, "signature": signature.hex()}
            self._session = session
        return self._session.announced

    def _shares(self, session: _Session, request: Words) -> Words:
        keys: dict[str, Words] = request["keys"]
        if session.shared:
            if keys != session.keys:
                raise MistrustError(f"{self.name} was shown other keys than before")
            return {"shares": session.shared}
        self._check_keys(session, keys)
        parties = sorted(keys)
        threshold = threshold_of(self._share, len(parties))
        points = {party: index + 1 for index, party in enumerate(parties)}
        seeds = shamir.split(session.seed, list(points.values()), threshold)
        privates = shamir.split(session.mask.private_bytes_raw(), list(points.values()), threshold)
        sent = {}
        for party, point in points.items():
            if party == self.name:
                session.held[party] = seeds[point], privates[point]
                continue
            sent[party] = encrypt(
                self._cipher_key(session, keys[party], party),
                seeds[point] + privates[point],
                context("share", session.name, self.name, party),
            ).hex()
        session.keys, session.threshold, session.shared = keys, threshold, sent
        return {"shares": sent}

    def _check_keys(self, session: _Session, keys: Mapping[str, Words]) -> None:
        if keys.get(self.name) != session.announced:
            raise MistrustError(f"{self.name}'s own keys are not among those that it was shown")
        if len(keys) < self._min_parties:
            raise MistrustError(f"{self.name} takes part with {self._min_parties} parties or more, not {len(keys)}")
        if len({theirs[kind] for theirs in keys.values() for kind in ("cipher", "mask")}) < 2 * len(keys):
            raise MistrustError("two parties have the same key")
        for party, theirs in keys.items():
            if not has_signed_keys(self.run, session.name, party, theirs):
                raise MistrustError(f"the keys of {party} are not signed by it for this run")
        for party, theirs in keys.items():  # who is known is remembered, so that all else has to hold
            if party != self.name and not self._knows(party, theirs["identity"]):
                raise MistrustError(f"{self.name} does not know {party} by the identity {theirs['identity']}")

    def _cipher_key(self, session: _Session, theirs: Words, party: str) -> bytes:
        return agree(
            session.cipher,
            bytes.fromhex(theirs["cipher"]),
            context("cipher", session.name, *sorted((self.name, party))),
        )

    def _take_shares(self, session: _Session, encrypted: Mapping[str, str]) -> None:
        if len(encrypted) + 1 < session.threshold or not encrypted.keys() <= session.keys.keys() - {self.name}:
            raise MistrustError(f"{len(encrypted) + 1} parties share, {session.threshold} are needed")
        for party, message in encrypted.items():
            try:
                both = decrypt(
                    self._cipher_key(session, session.keys[party], party),
                    bytes.fromhex(message),
                    context("share", session.name, party, self.name),
                )
            except InvalidTag as error:
                raise MistrustError(f"the shares of {party} were changed on the way") from error
            if len(both) != 2 * shamir.SHARE_BYTES:
                raise MistrustError(f"{party} sent no shares")
            session.held[party] = both[: shamir.SHARE_BYTES], both[shamir.SHARE_BYTES :]

    def _confirm(self, session: _Session, request: Words) -> Words:
        survivors = sorted(map(str, request["survivors"]))
        # Of whom it holds no share it has no mask either: without this, parties could be shown different sharers.
        if session.task is None or self.name not in survivors or not session.held.keys() >= set(survivors):
            raise MistrustError(f"{self.name} and others were not asked for masked sums as is said")
        if len(set(survivors)) < max(session.threshold, self._min_parties):
            raise MistrustError(f"a sum of {len(set(survivors))} parties, {session.threshold} are needed")
        if session.survivors not in (None, survivors):
            raise MistrustError(f"{self.name} has confirmed another sum")
        session.survivors = survivors
        statement = signed_survivors(session.name, session.keys, session.task, survivors)
        return {"signature": self._identity.sign(statement).hex()}

    def _unmask(self, session: _Session, request: Words) -> Words:
        survivors = session.survivors
        if survivors is None or session.task is None:
            raise MistrustError(f"{self.name} has confirmed no sum")
        statement = signed_survivors(session.name, session.keys, session.task, survivors)
        signatures: dict[str, str] = request["signatures"]
        if len(signatures) < session.threshold or not signatures.keys() <= set(survivors):
            raise MistrustError(f"{len(signatures)} parties confirm the sum, {session.threshold} are needed")
        for party, signature in signatures.items():
            if not has_signed(session.keys[party]["identity"], signature, statement):
                raise MistrustError(f"{party} has confirmed another sum, or was asked for something else")
        return {
            "seeds": {party: session.held[party][0].hex() for party in survivors},
            "privates": {party: held[1].hex() for party, held in session.held.items() if party not in survivors},
        }
