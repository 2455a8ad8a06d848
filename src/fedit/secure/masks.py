"""Key agreement, encryption and mask generation, all by the primitives of `cryptography`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable

import numpy as np
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

CHUNK_BYTES = 1 << 20
"""Of a mask that are in memory at a time"""
NONCE_BYTES = 12


def context(purpose: str, *parts: str) -> bytes:
    """Return what tells one use of a key from any other: a hash of its purpose and of whom and what it is for."""
    digest = hashlib.sha256(b"fedit secure aggregation 1")
    for part in (purpose, *parts):
        encoded = part.encode()
        digest.update(len(encoded).to_bytes(8) + encoded)
    return digest.digest()


def public_bytes(key: X25519PrivateKey) -> bytes:
    """Return the public key [32 bytes] of a private one."""
    return key.public_key().public_bytes_raw()


def agree(own: X25519PrivateKey, other: bytes, purpose: bytes) -> bytes:
    """Return the key [32 bytes] that the holders of two key pairs have in common (X25519, HKDF-SHA256).

    Raises:
        ValueError: `other` is no public key.
    """
    shared = own.exchange(X25519PublicKey.from_public_bytes(other))
    return HKDF(SHA256(), 32, salt=None, info=purpose).derive(shared)


def encrypt(key: bytes, content: bytes, about: bytes) -> bytes:
    """Return a content that only holders of the key can read, and nobody can change (AES-256-GCM)."""
    nonce = os.urandom(NONCE_BYTES)
    return nonce + AESGCM(key).encrypt(nonce, content, about)


def decrypt(key: bytes, message: bytes, about: bytes) -> bytes:
    """Return the content of a message.

    Raises:
        cryptography.exceptions.InvalidTag: it was changed, or is not `about` that, or for another key.
    """
    return AESGCM(key).decrypt(message[:NONCE_BYTES], message[NONCE_BYTES:], about)


def add_masks(numbers: Iterable[np.ndarray], plus: Iterable[bytes], minus: Iterable[bytes]) -> None:
    """Add to arrays of unsigned integers, in place, the masks of the keys `plus`, and subtract those of `minus`.

    A mask is the stream of AES-256 in counter mode under its key, which serves for one mask alone. It goes through the
    arrays in their order.
    """
    streams = [(_stream(key), np.add) for key in plus] + [(_stream(key), np.subtract) for key in minus]
    zeros, drawn = bytes(CHUNK_BYTES), bytearray(CHUNK_BYTES + 15)
    for array in numbers:
        length = CHUNK_BYTES // array.itemsize
        for start in range(0, len(array), length):
            part = array[start : start + length]
            for stream, apply in streams:
                stream.update_into(memoryview(zeros)[: part.nbytes], drawn)
                apply(part, np.frombuffer(drawn, part.dtype, len(part)), out=part)


def _stream(key: bytes) -> CipherContext:
    return Cipher(algorithms.AES256(key), modes.CTR(bytes(16))).encryptor()
