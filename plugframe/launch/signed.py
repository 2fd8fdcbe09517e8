"""What launchers of several nodes write into the store where they meet, under the job's token."""

from __future__ import annotations

import hmac
import os
from typing import Any

from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks.variables import TOKEN

_DIGITS = 64


class Signed:
    """A store whose values carry an authentication code (HMAC-SHA256 of key and value), if the job has a token.

    Everybody who reaches the store's port can write into it. Torch's elastic rendezvous unpickles what it reads
    there, and launchers send their ranks to addresses from it: with a token, only values of other launchers count.

    Args:
        store: of ``torch.distributed``.
    """

    def __init__(self, store: Any) -> None:
        self._store = store
        self._token = os.environ.get(TOKEN, "").encode()

    def set(self, key: str, value: str) -> None:
        """Write a value."""
        self._store.set(key, self._sealed(key, value))

    def get(self, key: str) -> bytes:
        """Return a value, waiting until it is there.

        Raises:
            EnvironmentMismatchError: if it was written without the token, or with another.
        """
        return self.opened(key, self._store.get(key))

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        """Write `desired` if the value is `expected` (empty: if there is none), and return what is there now."""
        expected = self._sealed(key, expected) if expected else ""
        return self.opened(key, self._store.compare_set(key, expected, self._sealed(key, desired)))

    def opened(self, key: str, data: bytes) -> bytes:
        """Return the value of what lies in the store under `key`; see `get`."""
        if not self._token:
            return data
        value, code = data[:-_DIGITS], data[-_DIGITS:]
        if not hmac.compare_digest(code, self._code(key, value)):
            raise EnvironmentMismatchError(
                f"The store of this job holds words of a launcher that was started without this {TOKEN}, or with "
                "another one: start all launchers of the job with the same."
            )
        return value

    def _sealed(self, key: str, value: str) -> str:
        return value + self._code(key, value.encode()).decode() if self._token else value

    def _code(self, key: str, value: bytes) -> bytes:
        return hmac.new(self._token, key.encode() + b"\0" + value, "sha256").hexdigest().encode()
