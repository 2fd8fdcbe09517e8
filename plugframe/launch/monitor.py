"""A second pair of eyes on the ranks: how each one died, and who would not leave."""

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

#: How long ranks may take to leave once another one has failed: so that all is over within 5 s. Torch would wait 30 s.
LEAVE_S = 4.0
#: The same on Ctrl-C, where somebody is at the terminal and waits: so that all is over within 1.5 s.
INTERRUPTED_S = 0.8
#: How long a rank that has told its failure may take to end.
LAST_WORDS_S = 10.0
_LOOK_S = 0.1
#: Every so many looks it is looked whether a rank is stopped.
_STOPPED_LOOKS = 10


@dataclass(frozen=True)
class Rank:
    """A process of the current attempt."""

    pid: int
    global_rank: int
    local_rank: int


@dataclass(frozen=True)
class Death:
    """When a rank's process ended, and with which exit code (negative for a signal)."""

    time: float
    exit_code: int


class Watch(threading.Thread):
    """Ends ranks that outstay a failure or a signal.

    Torch looks at the ranks a few times a second and calls `beat` while all are well. It stops looking once it
    ends them, and waits long for those that ignore it. This thread then sees no beats, and ranks that are left.

    Attributes:
        deaths: by process id; not complete where the system does not tell, or torch was faster.
        killed: process ids of those this thread has ended.
    """

    def __init__(
        self,
        *,
        ranks: Callable[[], list[Rank]],
        received: Callable[[], signal.Signals | None],
        insist: Callable[[], None],
        done: Callable[[int], bool],
        error_file: Callable[[int], Path],
        recalled: Callable[[], bool],
        ended_well: Callable[[Rank], None],
        grace_s: float,
    ) -> None:
        super().__init__(name="plugframe-watch", daemon=True)
        self.deaths: dict[int, Death] = {}
        self.killed: set[int] = set()
        self._insist = insist
        self._ranks, self._received, self._done, self._error_file = ranks, received, done, error_file
        self._recalled, self._ended_well, self._grace_s = recalled, ended_well, grace_s
        self._beats = 0
        self._ended = False
        self._wake = threading.Event()
        self._waiters: dict[int, threading.Thread] = {}
        self._stopped: set[int] = set()

    def beat(self) -> None:
        """Note that torch has found every rank alive."""
        self._beats += 1
        if self.ident is None:
            self.start()  # not before: a forked rank should find one thread
        if any(rank.pid not in self._waiters for rank in self._ranks()):
            # Not here: a signal handler that raises in the main thread during Thread.start() breaks the new thread.
            self._wake.set()

    def end(self) -> None:
        """Stop watching."""
        self._ended = True
        self._wake.set()
        if self.ident is not None:
            self.join()
        for waiter in self._waiters.values():
            waiter.join(_LOOK_S)

    def kill_all(self) -> None:
        """End every rank of the current attempt that is alive, at once, and what the ranks have started."""
        for rank in self._ranks():
            self._kill(rank)

    def run(self) -> None:
        seen, silent_s, looks = 0, 0.0, 0
        while not self._ended:
            woken = self._wake.wait(_LOOK_S)
            self._wake.clear()
            self._await_deaths()
            if woken:  # by new ranks, or to end: no time has passed
                continue
            looks += 1
            self._insist()
            if looks % _STOPPED_LOOKS == 0:
                self._tell_stopped()
            silent_s = 0.0 if self._beats != seen else silent_s + _LOOK_S
            seen = self._beats
            for rank in self._overstaying(silent_s):
                if is_child(rank.pid):
                    self.killed.add(rank.pid)
                self._kill(rank)

    def _tell_stopped(self) -> None:
        """Say once of a rank that it is stopped, by SIGSTOP or a terminal: the others wait for it."""
        for rank in self._ranks():
            stopped = _state(rank.pid) == "T"
            if stopped and rank.pid not in self._stopped:
                text = f"rank {rank.global_rank} (process {rank.pid}) is stopped, and the others will wait for it"
                print(f"plugframe: {text}: `kill -CONT {rank.pid}` lets it go on", file=sys.stderr, flush=True)
                self._stopped.add(rank.pid)
            elif not stopped:
                self._stopped.discard(rank.pid)

    def _overstaying(self, silent_s: float) -> list[Rank]:
        """Return the ranks whose time is up, or that of what they have left behind.

        Counted in looks, not by the clock: a launcher that was stopped and goes on (Ctrl-Z, fg) has not waited.
        """
        ranks = self._ranks()
        alive = [rank for rank in ranks if is_child(rank.pid)]
        signum = self._received()
        if signum is not None:
            limit_s = INTERRUPTED_S if signum is signal.SIGINT else self._grace_s
            return ranks if silent_s >= limit_s or not alive else []
        if silent_s >= LEAVE_S and (len(alive) < len(ranks) or self._recalled()):
            return [rank for rank in ranks if not self._done(rank.local_rank)]
        return [rank for rank in alive if self._age_of_last_words(rank) > LAST_WORDS_S]

    def _age_of_last_words(self, rank: Rank) -> float:
        try:
            return time.time() - self._error_file(rank.local_rank).stat().st_mtime
        except FileNotFoundError:
            return 0.0

    def _kill(self, rank: Rank) -> None:
        if is_child(rank.pid):  # by itself: a function's rank may have no group of its own yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.pid, signal.SIGKILL)
        _kill_group(rank.pid)

    def _await_deaths(self) -> None:
        for rank in self._ranks():
            if rank.pid not in self._waiters and hasattr(os, "waitid"):
                waiter = threading.Thread(target=self._await_death, args=(rank,), daemon=True)
                self._waiters[rank.pid] = waiter
                waiter.start()

    def _await_death(self, rank: Rank) -> None:
        """Learn how a process ended without taking that from torch, which waits for it too."""
        pid = rank.pid
        try:
            end = os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
        except ChildProcessError:
            return  # torch was faster
        if end is not None:
            code = end.si_status if end.si_code == os.CLD_EXITED else -end.si_status
            self.deaths[pid] = Death(time.time(), code)
            # What was forked from a function's rank holds what torch waits for.
            if code != 0:
                _kill_group(pid)
            else:
                self._ended_well(rank)


def _kill_group(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left, or it is being taken away
        os.killpg(pid, signal.SIGKILL)


def is_child(pid: int) -> bool:
    """Say whether `pid` is a living child of this process, and not another that has got its number."""
    if sys.platform != "linux":
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        return True
    fields = _stat(pid)
    return len(fields) > 1 and fields[0] not in "ZX" and int(fields[1]) == os.getpid()


def _state(pid: int) -> str:
    """Return the letter of the state that Linux gives a child of this process; empty where there is none."""
    fields = _stat(pid)
    return fields[0] if len(fields) > 1 and int(fields[1]) == os.getpid() else ""


def _stat(pid: int) -> list[str]:
    """Return state, parent and so on of a process as Linux tells them; nothing where it does not."""
    try:
        # The name, in parentheses, may hold anything: state and parent come after the last one.
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
