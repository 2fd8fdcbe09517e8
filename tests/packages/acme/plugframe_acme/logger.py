"""A logger that prints."""

from __future__ import annotations

from collections.abc import Mapping

from plugframe.base import Logger
from plugframe.hooks import hookimpl


class AcmeLogger(Logger):
    """Prints a line for each call."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        values = ", ".join(f"{name}={value:g}" for name, value in metrics.items())
        print(f"acme-logger: step {self.next_step(step)}: {values}", flush=True)
