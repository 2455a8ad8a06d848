"""Whom a site takes for whom: its own identity, and those of the other sites."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedit.engines.site_folder import SiteFolder
from fedit.files import write_json, write_secret
from fedit.interfaces import FeditError

log = logging.getLogger(__name__)


def own_identity(folder: Path) -> Ed25519PrivateKey:
    """Return a site's signing key, made at first: identity.key, which its owner alone can read.

    Raises:
        FeditError: the file is damaged, or cannot be written.
    """
    file = folder / "identity.key"
    if not file.is_file():
        write_secret(file, Ed25519PrivateKey.generate().private_bytes_raw().hex().encode())
    try:
        return Ed25519PrivateKey.from_private_bytes(bytes.fromhex(file.read_text(encoding="ascii")))
    except (OSError, ValueError) as error:
        raise FeditError(
            f"{file} cannot be read: {error}. Restore it; if it is lost, delete it, and tell the other sites the new "
            "identity."
        ) from error


def public_identity(key: Ed25519PrivateKey) -> str:
    """Return what others know an identity by, hexadecimal."""
    return key.public_key().public_bytes_raw().hex()


class KnownSites:
    """The other sites' identities: those that site.toml names under ``[peers]``, and no others; where it names none,
    each site's first is remembered (``peers.json``), and no other taken for it.
    """

    def __init__(self, folder: SiteFolder) -> None:
        self._folder = folder

    def knows(self, site: str, identity: str) -> bool:
        """Tell whether an identity is that of a site.

        Raises:
            FeditError: peers.json is damaged, or cannot be written.
        """
        if self._folder.config.peers:
            return self._folder.config.peers.get(site) == identity
        file = self._folder.path / "peers.json"
        try:
            known = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if site in known:
                return known[site] == identity
        except (OSError, ValueError, TypeError) as error:
            raise FeditError(f"{file} cannot be read: {error}. Restore it, or name the sites in site.toml.") from error
        write_json(file, {**known, site: identity})
        self._folder.log("learned an identity", client=site, sha256=identity)
        return True
