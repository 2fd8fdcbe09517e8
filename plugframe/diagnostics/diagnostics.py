"""The diagnostics of one job, attached to the core by notifications."""

from __future__ import annotations

from contextlib import ExitStack

from plugframe.core.planning.plan import Choice, Plan
from plugframe.diagnostics.call_log import CallLog
from plugframe.diagnostics.consistency import check_same_plugins
from plugframe.diagnostics.hang_report import HangReporter
from plugframe.diagnostics.instrument import record
from plugframe.diagnostics.stall_report import start_stall_reporter
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class Diagnostics:
    """Record collective calls, explain those that a rank does not reach, and compare plugins across ranks.

    The core does not import this class: a job whose plan has ``diagnostics=False`` runs without it, at no cost.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._reporter: HangReporter | None = None
        self._undo = ExitStack()

    def explain(self, error: BaseException) -> Exception | None:
        """Return an error with the status of every rank; None if `error` is not about missing ranks."""
        return None if self._reporter is None else self._reporter.explain(error)

    @hookimpl
    def on_connect(self, context: Context) -> None:
        if context.world.world_size == 1:
            return
        log = CallLog({_package(choice) for choice in self._plan.choices.values()})
        self._reporter = reporter = HangReporter(context, log)
        self._undo.callback(reporter.close)
        stalls = start_stall_reporter(context, log, reporter)
        if stalls is not None:
            self._undo.callback(stalls.close)
        self._undo.callback(record(context.hooks, log, reporter.explain))
        check_same_plugins(self._plan, context)

    @hookimpl
    def on_teardown(self) -> None:
        if self._reporter is not None:
            self._reporter.close()  # before any connection is closed, so that the other ranks receive the reason

    @hookimpl
    def on_disconnect(self) -> None:
        self._undo.close()
        self._reporter = None


def _package(choice: Choice) -> str:
    module = choice.entry.value if choice.entry is not None else type(choice.instance).__module__ or ""
    return module.partition(":")[0].partition(".")[0]
