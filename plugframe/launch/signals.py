"""Signals to the launcher: the first is passed on to the ranks, a second one ends them."""

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

#: torch's wrapper that times the agent's calls. An exception that rises in its first line becomes an UnboundLocalError.
_FRAGILE = "torch.distributed.elastic.metrics.api"
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
#: What schedulers send as a warning: it goes to the ranks, and ends nothing by itself.
WARNING = signal.SIGUSR1
#: The signals that torch handles itself. It takes a name it does not know for one less.
TORCH_SIGNALS = "TORCHELASTIC_SIGNALS_TO_HANDLE"


class Signals:
    """Handles signals for as long as it is entered, and puts back what was there.

    Signals that are ignored stay so (``nohup``). Outside the main thread it does nothing.

    Args:
        on_second: called for every signal after the first.
        on_warning: called for `WARNING`.
        on_interrupt: called for Ctrl-C, and says whether somebody else has taken it.

    Attributes:
        received: the first signal that came, None before.
        warned: whether a warning came and was passed on.
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
        """Raise for a signal that came where raising would have been lost."""
        if self.received is not None and not self._raised:
            self._raised = True
            raise SignalException(f"received {self.received.name}", self.received)

    def insist(self) -> None:
        """Send the main thread a signal again that it could not raise for. Any thread may call it."""
        if self.received is not None and not self._raised:
            ident = threading.main_thread().ident
            assert ident is not None
            signal.pthread_kill(ident, self.received)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a forked rank that has not begun its work
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
