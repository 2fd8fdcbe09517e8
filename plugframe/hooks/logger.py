"""The logger contract: record metrics. Any number of loggers can be selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from plugframe.hooks.markers import hookspec

if TYPE_CHECKING:
    from plugframe.hooks.context import Context


class LoggerSpec(Protocol):
    """Hooks of the kind ``logger``. Every selected logger gets every call."""

    @hookspec
    def logger_setup(self, context: Context) -> None:
        """Prepare the logger. Called once on every rank; write files on global rank 0 only."""
        ...

    @hookspec
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        """Record metrics. Called on global rank 0 by ``lite.log`` and ``lite.log_dict``.

        `step` is None when the user passed none; the logger then counts its own calls.
        """
        ...

    @hookspec
    def logger_teardown(self) -> None:
        """Flush and close. Called once on every rank, also after an exception."""
        ...
