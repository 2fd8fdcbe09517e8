"""Authenticate values in the store that launchers of several nodes share."""

from __future__ import annotations

import hmac
import os
from typing import Any

from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.variables import TOKEN

_DIGITS = 64


class SignedStore:
    """Store wrapper that signs values with HMAC-SHA256 of key and value, if the job has a token.

    Any process that reaches the store's port can write into it. Torch's elastic rendezvous unpickles values from the
    store, and ranks connect to addresses in it: with a token, only values of launchers of this job are accepted.

    Args:
        store: a ``torch.distributed`` store.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._token = os.environ.get(TOKEN, "").encode()

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._store.set(key, self._sign(key, value))

    def get(self, key: str) -> bytes:
        """Return a value; blocks until it exists.

        Raises:
            EnvironmentMismatchError: if it was written without the token, or with another one.
        """
        return self.verify(key, self._store.get(key))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write `desired` if the value is `expected` (empty: if there is none); return the current value."""
        expected = self._sign(key, expected) if expected else ""
        return self.verify(key, self._store.compare_set(key, expected, self._sign(key, desired)))

    def verify(self, key: str, data: bytes) -> bytes:
        """Return the value of the signed `data` under `key`; raises as `get` does."""
        if not self._token:
            return data
        value, code = data[:-_DIGITS], data[-_DIGITS:]
        if not hmac.compare_digest(code, self._code(key, value)):
            raise EnvironmentMismatchError(
                f"A launcher wrote to the store of this job without this {TOKEN}, or with another one: start all "
                "launchers of the job with the same token."
            )
        return value

    def _sign(self, key: str, value: str) -> str:
        return value + self._code(key, value.encode()).decode() if self._token else value

    def _code(self, key: str, value: bytes) -> bytes:
        return hmac.new(self._token, key.encode() + b"\0" + value, "sha256").hexdigest().encode()
