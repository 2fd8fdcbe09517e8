"""An extension that logs the learning rate."""

from __future__ import annotations

import weakref

from torch.optim import Optimizer

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class LRMonitor(Extension):
    """Add the learning rate to the metrics of each ``lite.log``, from the first optimizer step on.

    The name is ``lr``; of several optimizers, or groups of parameters, ``lr/0``, ``lr/1``, … in the order of their
    first steps. It is the rate at the call: log before ``scheduler.step()`` for that of the step. A metric of that
    name that the script logs itself stays.
    """

    def __init__(self) -> None:
        self._optimizers: list[weakref.ref[Optimizer]] = []

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._optimizers = []

    @hookimpl
    def on_teardown(self) -> None:
        self._optimizers = []

    @hookimpl
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        if not any(reference() is optimizer for reference in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))

    @hookimpl
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        alive = [each for each in (reference() for reference in self._optimizers) if each is not None]
        rates = [float(group["lr"]) for optimizer in alive for group in optimizer.param_groups if "lr" in group]
        for number, rate in enumerate(rates):
            metrics.setdefault("lr" if len(rates) == 1 else f"lr/{number}", rate)
