"""An extension that tells when a metric is the best so far."""

from __future__ import annotations

from typing import Any

from plugframe import OrderError
from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.monitored import Monitored
from plugframe_builtins.best_model import plugin


class BestModel(Extension):
    """Tell on all ranks whether the last logged value of a metric is the best so far, for a checkpoint of its own.

    The best value is in every checkpoint, so that a resumed run does not take its first value for the best. To keep
    several, see ``keep_best=`` of `Lite.checkpoints`, which also takes `metrics`.

    Args:
        monitor: the metric, by the name that ``lite.log`` gets.
        mode: ``"min"`` or ``"max"``, what is better.
        min_delta: the least change that is an improvement.
    """

    def __init__(self, *, monitor: str = "val_loss", mode: str = "min", min_delta: float = 0.0) -> None:
        plugin.validate(self, monitor=monitor, mode=mode, min_delta=min_delta)
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self._context: Context | None = None
        self._forget()

    def _forget(self) -> None:
        self._metric = Monitored(self.monitor, self.mode, self.min_delta, "best-model")
        self._improved = self._asked = False

    @property
    def value(self) -> float | None:
        """The best value, of global rank 0; None before the first."""
        return self._metric.best

    @property
    def metrics(self) -> dict[str, float]:
        """The last value by name, for ``CheckpointManager.save(…, metrics=…)``. The same on all ranks: all must ask."""
        last = self._from_rank_0(self._metric.last)
        return {} if last is None else {self.monitor: last}

    def improved(self) -> bool:
        """Return whether the metric has improved since the last call. The same on all ranks: every rank must call it.

        Raises:
            OrderError: outside of a job.
        """
        improved = bool(self._from_rank_0(self._improved))
        self._improved, self._asked = False, True
        return improved

    def _from_rank_0(self, value: Any) -> Any:
        if self._context is None:
            raise OrderError("The extension 'best-model' compares values of all ranks: use it while the job runs.")
        return self._context.hooks.collective_broadcast_object(obj=value, src=0, group=None)

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context
        self._forget()

    @hookimpl
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        if self._context is not None and self._context.world.global_rank == 0 and self._metric.take(metrics):
            self._improved = True

    @hookimpl
    def on_teardown(self) -> None:
        if self._context is not None and self._asked:
            self._metric.warn_if_unseen()
        self._context = None

    @hookimpl
    def extension_state(self) -> dict[str, Any]:
        return self._metric.state()

    @hookimpl
    def extension_load_state(self, state: dict[str, Any]) -> None:
        self._metric.load_state(state)
        self._improved = False
