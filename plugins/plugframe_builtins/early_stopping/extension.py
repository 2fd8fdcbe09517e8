"""An extension that asks for the end of the loop when a metric no longer improves."""

from __future__ import annotations

from typing import Any

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.monitored import Monitored
from plugframe_builtins.early_stopping import plugin


class EarlyStopping(Extension):
    """Request a stop after some logged values without an improvement; ``lite.should_stop`` is then True on all ranks.

    Of ranks that log different values that of global rank 0 decides, which is the one that is recorded.

    Args:
        monitor: the metric, by the name that ``lite.log`` gets.
        mode: ``"min"`` or ``"max"``, what is better.
        patience: values without an improvement after which the run stops.
        min_delta: the least change that is an improvement.

    Attributes:
        num_bad: values since the last improvement.
        best: the best value; None before the first.
    """

    def __init__(
        self, *, monitor: str = "val_loss", mode: str = "min", patience: int = 3, min_delta: float = 0.0
    ) -> None:
        plugin.validate(self, monitor=monitor, mode=mode, patience=patience, min_delta=min_delta)
        self.monitor, self.mode, self.patience, self.min_delta = monitor, mode, patience, min_delta
        self._context: Context | None = None
        self._forget()

    def _forget(self) -> None:
        self._metric = Monitored(self.monitor, self.mode, self.min_delta, "early-stopping")
        self.num_bad = 0

    @property
    def best(self) -> float | None:
        """The best value so far."""
        return self._metric.best

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context
        self._forget()

    @hookimpl
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        context = self._context
        if context is None or context.world.global_rank != 0:
            return
        improves = self._metric.take(metrics)
        if improves is None:
            return
        self.num_bad = 0 if improves else self.num_bad + 1
        if self.num_bad >= self.patience:
            context.request_stop(
                f"{self.monitor} has not improved on {self.best} in {self.num_bad} values, now {self._metric.last}"
            )

    @hookimpl
    def on_teardown(self) -> None:
        if self._context is not None:
            self._metric.warn_if_unseen()
        self._context = None

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return {**self._metric.state(), "num_bad": self.num_bad}

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self._metric.load_state(state)
        self.num_bad = state["num_bad"]
