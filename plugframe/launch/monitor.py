"""Monitor rank processes: exit causes, and ranks that do not stop."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

#: Time for ranks to exit after another rank has failed, so that a failure ends within 5 s. Torch would wait 30 s.
EXIT_TIMEOUT_S = 4.0
#: The same on Ctrl-C, so that an interactive interrupt ends within 1.5 s.
INTERRUPT_TIMEOUT_S = 0.8
#: Time for a rank to exit after it has written its error file.
ERROR_EXIT_TIMEOUT_S = 10.0
_POLL_S = 0.1
#: Whether the system can tell how a process ended and leave that to torch too. Not every Unix can.
_CAN_WAIT = hasattr(os, "waitid")
#: Polls between two checks for stopped ranks.
_STOPPED_POLLS = 10


@dataclass(frozen=True)
class Rank:
    """A rank process of the current attempt."""

    pid: int
    global_rank: int
    local_rank: int


@dataclass(frozen=True)
class ProcessExit:
    """Time and exit code of a rank process; the code is negative for a signal."""

    time: float
    exit_code: int


class RankMonitor(threading.Thread):
    """Thread that kills ranks which do not stop after a failure or a signal.

    Torch's agent calls `beat` several times a second while all ranks are alive. Once it terminates them, the beats
    stop, and it waits long for ranks that ignore SIGTERM. This thread detects that and kills the remaining ranks.

    Attributes:
        exits: exits by process id; incomplete where the system does not report them, or torch reaps a process first.
        killed: ids of the processes that this thread has killed.
    """

    def __init__(
        self,
        *,
        ranks: Callable[[], list[Rank]],
        received: Callable[[], signal.Signals | None],
        resend_signal: Callable[[], None],
        done: Callable[[int], bool],
        error_file: Callable[[int], Path],
        stop_requested: Callable[[], bool],
        on_success: Callable[[Rank], None],
        grace_s: float,
    ) -> None:
        super().__init__(name="plugframe-watch", daemon=True)
        self.exits: dict[int, ProcessExit] = {}
        self.killed: set[int] = set()
        self._resend_signal = resend_signal
        self._ranks, self._received, self._done, self._error_file = ranks, received, done, error_file
        self._stop_requested, self._on_success, self._grace_s = stop_requested, on_success, grace_s
        self._beats = 0
        self._ended = False
        self._wake = threading.Event()
        self._waiters: dict[int, threading.Thread] = {}
        self._stopped: set[int] = set()

    def beat(self) -> None:
        """Record that torch has found every rank alive."""
        self._beats += 1
        if self.ident is None:
            self.start()  # not earlier: ranks should be forked from a single-threaded process
        if _CAN_WAIT and any(rank.pid not in self._waiters for rank in self._ranks()):
            # Not here: a signal handler that raises in the main thread during Thread.start() breaks the new thread.
            self._wake.set()

    def end(self) -> None:
        """Stop the thread."""
        self._ended = True
        self._wake.set()
        if self.ident is not None:
            self.join()
        for waiter in self._waiters.values():
            waiter.join(_POLL_S)

    def kill_all(self) -> None:
        """Kill all ranks of the current attempt and their process groups."""
        for rank in self._ranks():
            self._kill(rank)

    def run(self) -> None:
        seen, silent_s, polls = 0, 0.0, 0
        while not self._ended:
            woken = self._wake.wait(_POLL_S)
            self._wake.clear()
            self._await_exits()
            if woken:  # by new ranks, or to end: no poll interval has passed
                continue
            polls += 1
            self._resend_signal()
            if polls % _STOPPED_POLLS == 0:
                self._report_stopped()
            silent_s = 0.0 if self._beats != seen else silent_s + _POLL_S
            seen = self._beats
            for rank in self._overdue(silent_s):
                if is_child(rank.pid):
                    self.killed.add(rank.pid)
                self._kill(rank)

    def _report_stopped(self) -> None:
        """Print one warning for a rank stopped by SIGSTOP or a terminal, which blocks the others."""
        for rank in self._ranks():
            stopped = _state(rank.pid) == "T"
            if stopped and rank.pid not in self._stopped:
                text = f"rank {rank.global_rank} (process {rank.pid}) is stopped and blocks the other ranks"
                print(f"plugframe: {text}: resume it with `kill -CONT {rank.pid}`", file=sys.stderr, flush=True)
                self._stopped.add(rank.pid)
            elif not stopped:
                self._stopped.discard(rank.pid)

    def _overdue(self, silent_s: float) -> list[Rank]:
        """Return the ranks that have exceeded their time to exit, or whose process group has.

        Counts polls instead of reading a clock: time while the launcher is stopped (Ctrl-Z, fg) does not count.
        """
        ranks = self._ranks()
        alive = [rank for rank in ranks if is_child(rank.pid)]
        signum = self._received()
        if signum is not None:
            limit_s = INTERRUPT_TIMEOUT_S if signum is signal.SIGINT else self._grace_s
            return ranks if silent_s >= limit_s or not alive else []
        if silent_s >= EXIT_TIMEOUT_S and (len(alive) < len(ranks) or self._stop_requested()):
            return [rank for rank in ranks if not self._done(rank.local_rank)]
        return [rank for rank in alive if self._error_file_age_s(rank) > ERROR_EXIT_TIMEOUT_S]

    def _error_file_age_s(self, rank: Rank) -> float:
        try:
            return time.time() - self._error_file(rank.local_rank).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _kill(self, rank: Rank) -> None:
        if is_child(rank.pid):  # individually: a function's rank may not have its own group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        _kill_group(rank.pid)

    def _await_exits(self) -> None:
        for rank in self._ranks() if _CAN_WAIT else ():
            if rank.pid not in self._waiters:
                waiter = threading.Thread(target=self._await_exit, args=(rank,), daemon=True)
                self._waiters[rank.pid] = waiter
                waiter.start()

    def _await_exit(self, rank: Rank) -> None:
        """Read the exit status of a process without reaping it, because torch waits for it too."""
        pid = rank.pid
        try:
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return  # torch has reaped it
        if end is not None:
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            self.exits[pid] = ProcessExit(time.time(), code)
            # Processes forked from a function's rank hold pipes that torch waits for.
            if code != 0:
                _kill_group(pid)
            else:
                self._on_success(rank)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # the group is empty, or being reaped
        os.killpg(pid, signal.SIGKILL)


def is_child(pid: int) -> bool:
    """Return whether `pid` is a living child of this process, and not another process that has reused the id."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    fields = _stat(pid)
    return len(fields) > 1 and fields[0] not in "ZX" and int(fields[1]) == os.getpid()


def _state(pid: int) -> str:
    """Return the Linux state letter of a child of this process; empty if there is no such child."""
    fields = _stat(pid)
    return fields[0] if len(fields) > 1 and int(fields[1]) == os.getpid() else ""


def _stat(pid: int) -> list[str]:
    """Return the fields of ``/proc/PID/stat`` from the state on; empty if there is no such process."""
    try:
        # The process name, in parentheses, may contain any character: split after the last parenthesis.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
