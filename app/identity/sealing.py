"""Secrets that must cross the queue, sealed: AES-256-GCM under the keys of `SEALING_KEYS`.

A sealed value is 12 random bytes and what AES-GCM makes of the secrets' JSON. It is bound to one text (a turn's id),
so that whoever can write to the database cannot move it to another turn. One key may seal 2**32 values.
"""

from __future__ import annotations

import base64
import json
import os
from collections.abc import Iterable
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from pydantic import SecretStr

from app.domain.errors import InvalidRequest, Unsealable
from app.settings import SEALING_KEY_BYTES

_NONCE_BYTES = 12


def make_sealing_key() -> str:
    """A new key in the form that `SEALING_KEYS` has: base64 of 256 random bits."""
    return base64.b64encode(os.urandom(SEALING_KEY_BYTES)).decode()


class Sealing:
    """Seals with the first of the keys, opens with any, so that keys can be changed without losing a turn."""

    def __init__(self, keys: Iterable[SecretStr]) -> None:
        """`keys`: as `Settings.sealing_keys` has checked them. None: nothing can be sealed or opened."""
        self._ciphers = [AESGCM(base64.b64decode(key.get_secret_value())) for key in keys]

    def seal(self, secrets: dict[str, Any], bound_to: str) -> bytes:
        """Raises InvalidRequest: there is no key, so a request that brings secrets cannot be served."""
        if not self._ciphers:
            raise InvalidRequest(
                "This server cannot keep the request's secrets: SEALING_KEYS is not set. Make a key with "
                "`caravan keys --sealing` and set it for every web and worker process"
            )
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._ciphers[0].encrypt(nonce, json.dumps(secrets).encode(), bound_to.encode())

    def open(self, sealed: bytes, bound_to: str) -> dict[str, Any]:
        """What was sealed for `bound_to`. Raises Unsealable: no key opens it, or it was sealed for another."""
        nonce, content = sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:]
        for cipher in self._ciphers:
            try:
                opened: dict[str, Any] = json.loads(cipher.decrypt(nonce, content, bound_to.encode()))
            except (InvalidTag, ValueError):  # ValueError: cut off within the nonce
                continue
            return opened
        raise Unsealable(
            "No key of SEALING_KEYS opens the request's secrets: every web and worker process needs the same keys, "
            "and an old key until what it sealed has ended"
        )
