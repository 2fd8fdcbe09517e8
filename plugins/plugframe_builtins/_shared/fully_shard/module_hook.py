"""A module hook that stays with its module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Hook:
    """A module hook that copies of the module do not inherit."""

    def __init__(self, call: Callable[..., Any] | None) -> None:
        self._call = call

    def __call__(self, *args: Any) -> None:
        if self._call is not None:
            self._call(*args)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return Hook(None)
