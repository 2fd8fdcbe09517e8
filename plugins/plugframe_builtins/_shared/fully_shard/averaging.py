"""Whether backwards of a sharded module average gradients over ranks."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Averaging:
    """A setting of a module that `fully_shard` has sharded.

    Args:
        sharded: the outermost module.

    Attributes:
        enabled: whether gradients are averaged.
    """

    def __init__(self, sharded: Any) -> None:
        self._sharded = sharded
        self.enabled = True

    @contextmanager
    def switched(self, enabled: bool) -> Iterator[None]:
        """Enable or disable it; restore the previous setting on exit."""
        before = self.enabled
        self._set(enabled)
        try:
            yield
        finally:
            self._set(before)

    def _set(self, enabled: bool) -> None:
        self.enabled = enabled
        self._sharded.set_requires_gradient_sync(enabled)
