"""Signal handling of the launcher: forward the first signal to the ranks, kill them on the second."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import ExitStack
from types import FrameType
from typing import Any

from torch.distributed.elastic.multiprocessing import SignalException

from plugframe.utils.environment import environment

#: torch's timing wrapper around agent calls. An exception in its first line becomes an UnboundLocalError.
_FRAGILE = "torch.distributed.elastic.metrics.api"
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: Sent by schedulers as an advance warning: forwarded to the ranks, and does not stop the job by itself.
WARNING = signal.SIGUSR1
#: Lists the signals torch handles itself; torch ignores unknown names.
TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


class Signals:
    """Context manager that handles signals and restores the previous handlers.

    Ignored signals stay ignored (``nohup``). Has no effect outside the main thread.

    Args:
        on_second: called for every signal after the first.
        on_warning: called for `WARNING`.
        on_interrupt: called for Ctrl-C; returns True if it has handled it.

    Attributes:
        received: the first signal received, None before.
        warned: whether `WARNING` was received and forwarded.
    """

    def __init__(
        self,
        *,
        on_second: Callable[[], None],
        on_warning: Callable[[], None],
        on_interrupt: Callable[[], bool] = lambda: False,
    ) -> None:
        self.received: signal.Signals | None = None
        self.warned = False
        self._raised = False
        self._on_warning = on_warning
        self._on_second = on_second
        self._on_interrupt = on_interrupt
        self._process = os.getpid()
        self._before: dict[signal.Signals, Any] = {}
        self._undo = ExitStack()

    def __enter__(self) -> Signals:
        self._undo.enter_context(environment({TORCH_SIGNALS: "NONE"}))
        if threading.current_thread() is threading.main_thread():
            for number in (*_HANDLED, WARNING):
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._undo.close()

    def check(self) -> None:
        """Raise for a signal received where raising was impossible."""
        if self.received is not None and not self._raised:
            self._raised = True
            raise SignalException(f"received {self.received.name}", self.received)

    def resend(self) -> None:
        """Resend to the main thread a signal that it could not raise for. Thread-safe."""
        if self.received is not None and not self._raised:
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked rank before it starts its function
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        elif number == WARNING:
            self.warned = True
            self._on_warning()
        elif number == signal.SIGINT and self._on_interrupt():
            return
        elif not self._raised:
            self.received = self.received or signal.Signals(number)
            if frame is None or frame.f_globals.get("__name__") != _FRAGILE:
                self.check()
        else:
            self._on_second()
