"""The other acme."""

from __future__ import annotations

from plugframe.base import Strategy


class Twin(Strategy):
    """The base's one rank."""
