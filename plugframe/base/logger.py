"""The base class of loggers."""

from __future__ import annotations

from plugframe.hooks import LoggerSpec, hookimpl
from plugframe.hooks.context import Context


class Logger(LoggerSpec):
    """Base class of loggers: implement `logger_log`, marked with ``@hookimpl``.

    Attributes:
        calls: the number of calls of ``lite.log`` so far, the default for the step.
    """

    calls: int = 0

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        pass

    @hookimpl
    def logger_teardown(self) -> None:
        pass

    def next_step(self, step: int | None) -> int:
        """Return `step`, or the number of this call (from 0) if it is None."""
        number = self.calls if step is None else step
        self.calls += 1
        return number
