"""A base for loggers."""

from __future__ import annotations

from plugframe.hooks import LoggerSpec, hookimpl
from plugframe.hooks.context import Context


class Logger(LoggerSpec):
    """Subclass it, give `logger_log`, and mark it with ``@hookimpl``.

    Attributes:
        calls: how many calls of ``lite.log`` it has seen, which stands for the step where none is given.
    """

    calls: int = 0

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        pass

    @hookimpl
    def logger_teardown(self) -> None:
        pass

    def next_step(self, step: int | None) -> int:
        """Return `step`, or the number of this call (from 0) where the user gave none."""
        number = self.calls if step is None else step
        self.calls += 1
        return number
