"""Record the end of a run that SIGTERM ends, such as that of a rank which is stopped because another one has failed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class TerminationHandler:
    """Handles SIGTERM until `close`, where nothing else does: ends the records of the run, then dies of the signal.

    Args:
        record: called with the error to record.
    """

    def __init__(self, record: Callable[[BaseException], object]) -> None:
        self._record = record
        self._process = os.getpid()
        self._blocked, self._waits = 0, False
        in_main = threading.current_thread() is threading.main_thread()
        if in_main and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._handle)

    @contextmanager
    def blocked(self) -> Iterator[None]:
        """Delay the signal while a logger records: it could not be called a second time."""
        self._blocked += 1
        try:
            yield
        finally:
            self._blocked -= 1
            if self._waits and not self._blocked:
                self._handle(signal.SIGTERM, None)

    def close(self) -> None:
        """Restore the default. It may be called twice: another handler may have been set on top, and be gone now."""
        if signal.getsignal(signal.SIGTERM) == self._handle:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        mine = os.getpid() == self._process  # and not a process that was forked from it
        if mine and self._blocked:
            self._waits = True
            return
        # Before the records: a second signal ends the process at once.
        signal.signal(number, signal.SIG_DFL)
        try:
            if mine:
                self._record(SystemExit("terminated by SIGTERM"))
        finally:
            os.kill(os.getpid(), number)
