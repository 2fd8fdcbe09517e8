"""The base class of loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from plugframe.hooks import LoggerSpec, hookimpl
from plugframe.hooks.context import Context
from plugframe.hooks.logger import Artifact, HyperParameter, artifact_kind
from plugframe.utils.logging import warn_caller


class Logger(LoggerSpec):
    """Base class of loggers: implement `logger_log`, marked with ``@hookimpl``.

    What a logger does not implement is not stored, with one warning for each: hyperparameters, and artifacts by kind.

    Attributes:
        calls: the number of calls of ``lite.log`` so far, the default for the step.
    """

    calls: int = 0
    #: What the logger has warned of.
    _not_stored: frozenset[str] = frozenset()

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        pass

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        self.warn_not_stored("hyperparameters", next(iter(params), ""))

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        self.warn_not_stored(f"{artifact_kind(value)}s", name)

    @hookimpl
    def logger_run_id(self) -> str | None:
        return None

    @hookimpl
    def logger_state(self) -> dict[str, Any]:
        """Return the run's id and the number of calls."""
        run_id = self.logger_run_id()
        return {} if run_id is None else {"run_id": run_id, "calls": self.calls}

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        """Continue to count calls where the saved run was. To continue its run, override it and use ``"run_id"``."""
        if "calls" in state:
            self.calls = int(state["calls"])

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        pass

    def next_step(self, step: int | None) -> int:
        """Return `step`, or the number of this call (from 0) if it is None."""
        number = self.calls if step is None else step
        self.calls += 1
        return number

    def warn_not_stored(self, what: str, name: str) -> None:
        """Warn that this logger does not store `what`, such as ``"tables"``; once for each."""
        if what not in self._not_stored:
            self._not_stored |= {what}
            warn_caller(f"{type(self).__name__} does not store {what}: {name!r} and later ones are not recorded there.")
