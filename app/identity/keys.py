"""API keys: made here, kept only as hashes, each named after the principal that it stands for."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Iterable

LOCAL_PRINCIPAL = "local"
"""The owner of everything while there are no keys. A key of this name owns all that was made then."""

PREFIX = "caravan_"
_BYTES = 32


def make_key() -> str:
    """A new key: 256 random bits, URL-safe, with a prefix that secret scanners and people recognise."""
    return PREFIX + secrets.token_urlsafe(_BYTES)


def entry(principal: str, key: str) -> str:
    """What `API_KEYS` holds of a key. SHA-256 is enough: nobody guesses 256 random bits, however fast the hash."""
    return f"{principal}:{hashlib.sha256(key.encode()).hexdigest()}"


class Keys:
    """The keys of an installation."""

    def __init__(self, entries: Iterable[str]) -> None:
        """`entries`: `name:sha256hex`, as `Settings.api_keys` has checked them; a name may have several."""
        pairs = [each.split(":") for each in entries]
        self._hashes = [(bytes.fromhex(digest), principal) for principal, digest in pairs]

    def __bool__(self) -> bool:
        return bool(self._hashes)

    def principal(self, key: bytes) -> str | None:
        """Whom a key stands for; None if nobody. Takes as long for every key, right or wrong."""
        given = hashlib.sha256(key).digest()
        found = None
        for digest, principal in self._hashes:
            if hmac.compare_digest(digest, given):
                found = principal
        return found
