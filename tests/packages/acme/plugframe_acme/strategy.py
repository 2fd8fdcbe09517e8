"""Data parallelism without an engine: backward, then one mean for each gradient."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import Strategy
from plugframe.hooks import Engine, hookimpl


class Acme(Strategy):
    """Every rank holds the whole model; the mean is linear, so accumulated gradients may be averaged again."""

    def __init__(self) -> None:
        self._modules: list[weakref.ref[nn.Module]] = []
        self._local = False

    @hookimpl
    def strategy_setup_module(self, module: nn.Module) -> Engine:
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                tensor.copy_(self.context.hooks.collective_broadcast(tensor=tensor, src=0, group=None))
        self._modules.append(weakref.ref(module))
        return None

    @hookimpl
    def strategy_backward(
        self, loss: Tensor, module: nn.Module | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        super().strategy_backward(loss=loss, module=module, args=args, kwargs=kwargs)
        if self._local:
            return
        for parameter in self._parameters():
            if parameter.grad is not None:
                mean = self.context.hooks.collective_all_reduce(tensor=parameter.grad, op="mean", group=None)
                parameter.grad.copy_(mean)

    @hookimpl
    def strategy_no_sync(self, module: nn.Module, engine: Engine, enabled: bool) -> AbstractContextManager[Any]:
        return self._locally(enabled)

    @contextmanager
    def _locally(self, enabled: bool) -> Iterator[None]:
        before, self._local = self._local, enabled
        try:
            yield
        finally:
            self._local = before

    def _parameters(self) -> Iterator[nn.Parameter]:
        for module in filter(None, (reference() for reference in self._modules)):
            yield from module.parameters()
