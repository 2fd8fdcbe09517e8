"""Hooks of the script's own on parameters, which see a gradient before it is averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from plugframe.utils.logging import warn_caller


class Hooked:
    """Looks for hooks on parameters at the first backward and then less and less, and warns once.

    Args:
        speaks: whether this rank warns.
    """

    def __init__(self, *, speaks: bool) -> None:
        self._speaks = speaks
        self._looks = 0

    def look(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Warn if one of the parameters has a hook. Called before every backward."""
        self._looks += 1
        if not self._speaks or self._looks & (self._looks - 1):
            return
        name = next((name for name, parameter in named() if parameter._backward_hooks), None)
        if name is not None:
            self._speaks = False
            warn_caller(
                f"The hook on parameter {name!r} sees each rank's own gradient, before the mean over ranks: one that "
                "is not linear, such as a clamp, gives other numbers than in one process. Use strategy='fsdp', where "
                "hooks see the mean, or a linear hook."
            )
