"""A metric that an extension watches: its best value so far, and a warning if it never comes."""

from __future__ import annotations

import difflib
import math
from typing import Any

from plugframe.base import warn_caller

#: Calls of ``lite.log`` without the metric after which a warning says so.
CALLS_BEFORE_WARNING = 100


class Monitored:
    """The best value of a metric, of the values that global rank 0 logs: those that are recorded.

    A value that is NaN is no improvement.

    Attributes:
        best: the best value; None before the first.
        last: the last value; None before the first.
    """

    def __init__(self, monitor: str, mode: str, min_delta: float, extension: str) -> None:
        self.monitor, self.mode, self.min_delta, self.extension = monitor, mode, min_delta, extension
        self.best: float | None = None
        self.last: float | None = None
        self._calls = 0
        self._others: set[str] = set()
        self._seen = self._warned = False

    def take(self, metrics: dict[str, float]) -> bool | None:
        """Return whether the logged metrics improve on the best value; None if the metric is not among them."""
        if self.monitor not in metrics:
            self._calls += 1
            self._others.update(metrics)
            if self._calls == CALLS_BEFORE_WARNING:
                self.warn_if_unseen()
            return None
        self._seen = True
        self.last = value = float(metrics[self.monitor])
        improves = self.improves(value)
        if improves:
            self.best = value
        return improves

    def improves(self, value: float) -> bool:
        """Return whether a value is better than the best one by `min_delta`."""
        if math.isnan(value):
            return False
        if self.best is None:
            return True
        gain = self.best - value if self.mode == "min" else value - self.best
        return gain > self.min_delta

    def warn_if_unseen(self) -> None:
        """Warn, once, if metrics were logged and the one that is watched never was."""
        if self._seen or self._warned or not self._calls:
            return
        self._warned = True
        close = difflib.get_close_matches(self.monitor, self._others, 1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        names = ", ".join(map(repr, sorted(self._others)[:8]))
        warn_caller(
            f"Extension {self.extension!r} watches {self.monitor!r}, which was never logged on rank 0: it does nothing."
            f" Logged: {names}.{hint} Set --extension.{self.extension}.monitor."
        )

    def state(self) -> dict[str, Any]:
        return {"monitor": self.monitor, "mode": self.mode, "best": self.best, "last": self.last}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restore the result of `state`.

        Raises:
            ValueError: if it is of another metric.
        """
        if (state["monitor"], state["mode"]) != (self.monitor, self.mode):
            raise ValueError(
                f"the checkpoint watches {state['monitor']!r} ({state['mode']}), and here it is {self.monitor!r} "
                f"({self.mode})"
            )
        self.best, self.last = state["best"], state["last"]
