"""Report on stderr, while a job goes on, that ranks wait in a collective for one that is elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Mapping

from plugframe.diagnostics.call_log import Call, CallLog
from plugframe.diagnostics.hang_report import LATE_S, HangReporter
from plugframe.diagnostics.rank_status import Account, find
from plugframe.hooks.context import Context
from plugframe.utils.rank_text import ranks_text

#: A report that changed nothing is repeated after so many times as long: 30 s, 2 min, 8 min.
GROWTH = 4
#: In these a rank works for itself, and waits in calls of their own.
_WORK = ("checkpoint_save", "checkpoint_load")


def start_stall_reporter(context: Context, log: CallLog, reporter: HangReporter) -> StallReporter | None:
    """Start watching this rank's calls; return None if nothing is to be reported."""
    after_s = context.report_after_s
    late = context.timeout_s is not None and context.timeout_s <= after_s
    if not after_s or late or "simulated" in context.provides.get("collective", ()):
        return None
    return StallReporter(log, reporter, rank=context.world.global_rank, after_s=after_s)


class StallReporter:
    """A thread that sleeps, and looks a few times per `after_s` whether this rank is in one call all the while.

    Args:
        log: this rank's calls.
        reporter: what asks the other ranks.
        rank: this one.
        after_s: how long a call may take before the others are asked.
    """

    def __init__(self, log: CallLog, reporter: HangReporter, *, rank: int, after_s: float) -> None:
        self._log, self._reporter = log, reporter
        self._rank, self._after_s = rank, after_s
        self._began, self._due_s = 0.0, after_s
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="plugframe-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._closed.set()
        self._thread.join(1.0)

    def _run(self) -> None:
        pause_s = self._after_s / 4
        while not self._closed.wait(pause_s):
            pause_s = min(self._look(), self._after_s / 4)

    def _look(self) -> float:
        """Report if it is time to; return in how many seconds it may be."""
        waiting = self._log.waiting()
        if waiting is None or waiting[0].hook in _WORK:
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
        """Return what is to be said, ``""`` if all ranks are in this call, or another rank says it."""
        accounts = self._reporter.look(f"{call.number}/{call.hook}/{self._due_s:g}")
        now = self._log.waiting()
        if not accounts or now is None or now[1] != self._began or self._closed.is_set():
            return ""
        if any(_waits_longer(account, call, waited_s) for account in accounts.values()):
            return ""
        return report(accounts, self._rank, waited_s)


def report(accounts: Mapping[int, Account | None], rank: int, waited_s: float) -> str:
    """Return one line on who waits for whom, ``""`` if all ranks are in the same call.

    Args:
        accounts: of every rank; None for one that did not answer.
        rank: the one that waits.
        waited_s: for how long.
    """
    found = find(accounts, rank, seconds=LATE_S)
    if found.culprit is None:
        return ""
    waited_for = "" if found.culprit == rank else f" for {ranks_text([found.culprit])}"
    sites = {(call.file, call.line) for call in map(_running, accounts.values()) if call is not None}
    # Ranks that came to one call by one line make no mistake: one of them has more to do there, such as writing.
    mistaken = len(sites) > 1 or _running(accounts[found.culprit]) is None
    return f"plugframe: still waiting{waited_for} after {waited_s:.3g} s: {found.text if mistaken else found.places}"


def _running(account: Account | None) -> Call | None:
    return None if account is None else account.running


def _waits_longer(account: Account | None, call: Call, waited_s: float) -> bool:
    """Say whether a rank waits in another call for longer, and reports it."""
    other = _running(account)
    if account is None or other is None or other.number == call.number or other.hook in _WORK:
        return False
    return account.waited_s > waited_s
