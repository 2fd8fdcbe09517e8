"""Report on stderr when ranks wait in a collective for a rank that is elsewhere, while the job continues."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping

from plugframe.diagnostics.call_log import Call, CallLog
from plugframe.diagnostics.hang_report import TIMEOUT_RESPONSE_S, HangReporter
from plugframe.diagnostics.rank_status import RankStatus, diagnose
from plugframe.hooks.context import Context
from plugframe.utils.rank_text import ranks_text

#: Factor between the times of repeated reports of one call: 30 s, 2 min, 8 min.
GROWTH = 4
#: Hooks in which a rank works on its own, and whose own collectives are recorded separately.
_LOCAL_WORK = ("checkpoint_save", "checkpoint_load")


def start_stall_reporter(context: Context, log: CallLog, reporter: HangReporter) -> StallReporter | None:
    """Start the stall reporter of this rank; return None if it is disabled or has no effect."""
    after_s = context.report_after_s
    late = context.timeout_s is not None and context.timeout_s <= after_s
    if not after_s or late or "simulated" in context.provides.get("collective", ()):
        return None
    return StallReporter(log, reporter, rank=context.world.global_rank, after_s=after_s)


class StallReporter:
    """Thread that checks several times per `after_s` whether this rank has been in one call for that long.

    Args:
        log: call log of this rank.
        reporter: collects the status of other ranks.
        rank: global rank of this process.
        after_s: time in seconds after which a running call is reported.
    """

    def __init__(self, log: CallLog, reporter: HangReporter, *, rank: int, after_s: float) -> None:
        self._log, self._reporter = log, reporter
        self._rank, self._after_s = rank, after_s
        self._began, self._due_s = 0.0, after_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plugframe-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread."""
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        pause_s = self._after_s / 4
        while not self._closed.wait(pause_s):
            pause_s = min(self._check(), self._after_s / 4)

    def _check(self) -> float:
        """Report if the call has run long enough; return the seconds until the next check."""
        waiting = self._log.waiting()
        if waiting is None or waiting[0].hook in _LOCAL_WORK:
            return self._after_s
        call, began = waiting
        if began != self._began:
            self._began, self._due_s = began, self._after_s
        waited_s = time.monotonic() - began
        if waited_s >= self._due_s:
            text = self._report(call, waited_s)
            if text:
                sys.stderr.write(f"{text}\n")
                sys.stderr.flush()
            while self._due_s <= waited_s:
                self._due_s *= GROWTH
        return max(self._due_s - waited_s, 0.0)

    def _report(self, call: Call, waited_s: float) -> str:
        """Return the report; empty if all ranks are in this call, or another rank reports it."""
        statuses = self._reporter.collect(f"{call.number}/{call.hook}/{self._due_s:g}")
        now = self._log.waiting()
        if not statuses or now is None or now[1] != self._began or self._closed.is_set():
            return ""
        if any(_waits_longer(status, call, waited_s) for status in statuses.values()):
            return ""
        return report(statuses, self._rank, waited_s)


def report(statuses: Mapping[int, RankStatus | None], rank: int, waited_s: float) -> str:
    """Return one line with the rank that is waited for and the status of all; empty if all are in the same call.

    Args:
        statuses: by rank; None for a rank that did not respond.
        rank: the waiting rank.
        waited_s: how long it has waited, in seconds.
    """
    found = diagnose(statuses, rank, seconds=TIMEOUT_RESPONSE_S)
    if found.culprit is None:
        return ""
    waited_for = "" if found.culprit == rank else f" for {ranks_text([found.culprit])}"
    sites = {(call.file, call.line) for call in map(_running, statuses.values()) if call is not None}
    # Ranks that make one call at one line are correct: one of them has more to do there, such as writing. Not so
    # ranks that all send at one line.
    mine = _running(statuses[rank])
    in_messages = mine is not None and mine.peer is not None
    diverged = len(sites) > 1 or in_messages or _running(statuses[found.culprit]) is None
    return f"plugframe: still waiting{waited_for} after {waited_s:.3g} s: {found.text if diverged else found.places}"


def _running(status: RankStatus | None) -> Call | None:
    return None if status is None else status.running


def _waits_longer(status: RankStatus | None, call: Call, waited_s: float) -> bool:
    """Return whether a rank has waited longer in another call, and therefore reports it."""
    other = _running(status)
    if status is None or other is None or other.hook in _LOCAL_WORK:
        return False
    if other.number == call.number and other.peer is None and call.peer is None:  # the same call
        return False
    return status.waited_s > waited_s
