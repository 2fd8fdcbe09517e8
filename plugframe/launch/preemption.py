"""Preemption: agree across ranks on whether any of them has received a stop signal, or a plugin requests a stop."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from types import FrameType
from typing import Any

import torch

#: Signals that schedulers send before they end a job: SIGTERM in general, either with SLURM's ``--signal``.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class PreemptionHandler:
    """Handle stop signals from the first call of `should_stop` on; before, they end the process as usual.

    Attributes:
        received: the first signal this rank received, None before.
        was_read: whether `should_stop` has been called.
        reason: why a plugin requested a stop, and its rank; empty before, and after a signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.was_read = self._should_stop = False
        self.reason = ""
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def should_stop(self, hooks: Any, requests: Sequence[str] = ()) -> bool:
        """Return whether any rank has received a signal or a request. Every rank must call it.

        The result is the same on all ranks.

        Args:
            requests: why plugins on this rank request a stop.
        """
        self.was_read = True
        self._install_handlers()
        if not self._should_stop:
            mine = torch.tensor(2 if requests else int(self.received is not None))
            agreed = int(hooks.collective_all_reduce(tensor=mine, op="max", group=None))
            self._should_stop = agreed > 0
            if agreed == 2:
                everyone = hooks.collective_all_gather_object(obj=list(requests), group=None)
                self.reason = next(f"rank {rank}: {reasons[0]}" for rank, reasons in enumerate(everyone) if reasons)
        return self._should_stop

    def close(self) -> None:
        """Restore the previous signal handlers and reset the state."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before.clear()
        self.received, self.reason = None, ""
        self.was_read = self._should_stop = False

    def _install_handlers(self) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a DataLoader worker that inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # A signal to the complete job reaches a rank twice: directly, and through its launcher.
        self.received = self.received or signal.Signals(number)
