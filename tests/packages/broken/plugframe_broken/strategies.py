"""Strategies that break the contract, and one that would be another."""

from __future__ import annotations

from typing import Any

from plugframe.base import Strategy
from plugframe.hooks import hookimpl


class Unmarked(Strategy):
    """One override lacks its mark: without a check the base's would never run either."""

    def strategy_next_batch(self, iterator: Any, exhausted: Any) -> Any:
        return next(iterator, exhausted)


class Unknown(Strategy):
    """A hook that does not exist."""

    @hookimpl
    def strategy_backwards(self, loss: Any) -> None:
        loss.backward()


class Raising(Strategy):
    """It cannot be made."""

    def __init__(self) -> None:
        raise OSError("no chip on the bus")


class Usurper(Strategy):
    """Whole in itself, under a name that is taken."""
