"""An extension that detects when the ranks' models diverge."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Extension
from plugframe.diagnostics.replicas import check_in_sync, check_replicated, named_tensors
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.drift_guard import plugin


class DriftGuard(Extension):
    """Compare parameters and optimizer state across ranks every few optimizer steps.

    They must be equal bit for bit; the error, on all ranks, names the first difference. For strategies that
    replicate the model.

    Args:
        every: optimizer steps between two comparisons.
    """

    def __init__(self, *, every: int = 100) -> None:
        plugin.validate(self, every=every)
        self.every = every
        self._context: Context | None = None
        self._modules: list[weakref.ref[nn.Module]] = []
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._steps = 0

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._forget()
        check_replicated(context.provides.get("strategy", ()), "Extension 'drift-guard'")
        self._context = context if context.world.world_size > 1 else None

    @hookimpl
    def on_teardown(self) -> None:
        self._forget()

    def _forget(self) -> None:
        self._context = None
        self._modules.clear()
        self._optimizers.clear()
        self._steps = 0

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        if self._context is not None:
            self._modules.append(weakref.ref(module))

    @hookimpl
    def on_optimizer_step(self, optimizer: Optimizer) -> None:
        if self._context is None:
            return
        if not any(reference() is optimizer for reference in self._optimizers):
            self._optimizers.append(weakref.ref(optimizer))
        self._steps += 1
        if self._steps % self.every == 0:
            check_in_sync(self._named, self._context.hooks, f" at optimizer step {self._steps}")

    def _named(self) -> Iterator[tuple[str, Tensor]]:
        return named_tensors(_alive(self._modules), _alive(self._optimizers))


def _alive(references: list[weakref.ref[Any]]) -> list[Any]:
    return [each for each in (reference() for reference in references) if each is not None]
