"""Warn about user hooks on parameters that see gradients before they are averaged."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from plugframe.utils.logging import warn_caller


class TensorHookCheck:
    """Search for hooks on parameters at the first backward and then ever more rarely; warn once.

    Args:
        warns: whether this rank warns.
    """

    def __init__(self, *, warns: bool) -> None:
        self._speaks = warns
        self._looks = 0

    def look(self, named: Callable[[], Iterable[tuple[str, Tensor]]]) -> None:
        """Warn if a parameter has a hook. Called before every backward."""
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
