"""An extension: it wraps one hook and listens to another."""

from __future__ import annotations

from collections.abc import Generator
from typing import Any

from plugframe.base import Extension
from plugframe.hooks import hookimpl


class Counter(Extension):
    """Counts backwards and prints their number at the end.

    Attributes:
        count: how many there were.
    """

    def __init__(self) -> None:
        self.count = 0

    @hookimpl(wrapper=True)
    def strategy_backward(self) -> Generator[None, Any, Any]:
        self.count += 1
        return (yield)

    @hookimpl
    def on_teardown(self) -> None:
        print(f"acme-counter: {self.count} backwards", flush=True)
