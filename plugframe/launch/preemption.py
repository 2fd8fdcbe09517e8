"""Being asked to stop: a signal to one rank that all of them heed at the same step."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch

#: What schedulers send before they end a job: SLURM either, with ``--signal``; Kubernetes and most others SIGTERM.
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


class Stopping:
    """Listens to signals from the first question on; until then they end the process, as ever.

    Attributes:
        received: the signal this rank was sent, None before.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._agreed = False
        self._before: dict[signal.Signals, Any] = {}
        self._process = os.getpid()

    def agreed(self, hooks: Any) -> bool:
        """Say whether any rank has been sent a signal. Every rank must ask, and all get the same answer."""
        self._listen()
        if not self._agreed:
            mine = torch.tensor(int(self.received is not None))
            self._agreed = bool(hooks.collective_all_reduce(tensor=mine, op="max", group=None))
        return self._agreed

    def close(self) -> None:
        """Put back the handlers that were there, and forget."""
        for number, before in self._before.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, before)
        self._before.clear()
        self.received, self._agreed = None, False

    def _listen(self) -> None:
        if self._before or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a loader's worker, which has inherited this handler
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        # Whoever signals a whole job reaches a rank twice: by itself, and through its launcher.
        self.received = self.received or signal.Signals(number)
