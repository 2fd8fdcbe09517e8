"""The logger contract: record metrics. Any number of loggers can be selected."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

from plugframe.hooks.markers import hookspec, per_plugin

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

    @per_plugin
    def logger_state(self) -> dict[str, Any]:
        """Return the state of this logger for checkpoints. Optional, with `logger_load_state`.

        Called on every rank by ``lite.save`` and ``lite.load``, as `extension_state`, which describes the values and
        the name they are saved under.

        Example:
            ``return {"run_id": self.run_id}``
        """
        return {}

    @per_plugin
    def logger_load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `logger_state`. Called on every rank by ``lite.load``, as `extension_load_state`."""
        return None
