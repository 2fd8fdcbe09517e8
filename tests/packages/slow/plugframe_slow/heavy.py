"""Stands for something that takes long to import."""

from __future__ import annotations

from collections.abc import Mapping

from plugframe.base import Logger, Strategy
from plugframe.hooks import hookimpl
from plugframe_slow import trace

trace("implementations")


class Slow(Strategy):
    """The base's one rank."""


class SlowLogger(Logger):
    """Drops metrics."""

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.next_step(step)
