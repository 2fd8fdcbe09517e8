"""An extension that logs the norm of the gradients."""

from __future__ import annotations

import math
import weakref
from collections.abc import Generator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.base import Extension
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.grad_norm import plugin


class GradNorm(Extension):
    """Add the norm of the gradients of the last optimizer step, ``grad_norm``, to the metrics of each ``lite.log``.

    It is that of all ranks, before clipping: what ``lite.clip_gradients(max_norm=…)`` finds, or if the script does not
    clip, one that is computed before the step; a step with a closure has none then.

    Args:
        norm_type: the order of the norm, where the script does not clip.
        every: optimizer steps between two norms, where the script does not clip.

    Attributes:
        last: the norm of the last step that has one; None before.
    """

    def __init__(self, *, norm_type: float = 2.0, every: int = 1) -> None:
        plugin.validate(self, norm_type=norm_type, every=every)
        self.norm_type, self.every = norm_type, every
        self._context: Context | None = None
        self._forget()

    def _forget(self) -> None:
        self.last: Tensor | None = None
        self._modules: list[weakref.ref[nn.Module]] = []
        self._clipped: Tensor | None = None
        self._measures = False
        self._num_steps = 0

    @hookimpl
    def on_launch(self, context: Context) -> None:
        self._context = context
        self._forget()

    @hookimpl
    def on_teardown(self) -> None:
        self._context = None
        self._modules = []

    @hookimpl
    def on_setup(self, module: nn.Module) -> None:
        self._modules.append(weakref.ref(module))

    @hookimpl(wrapper=True)
    def strategy_clip_gradients(self, max_norm: float | None) -> Generator[None, Any, Any]:
        norm = yield
        if not self._measures and max_norm is not None and max_norm < math.inf and norm is not None:
            self._clipped = norm.detach() if isinstance(norm, Tensor) else norm
        return norm

    @hookimpl(wrapper=True)
    def strategy_optimizer_step(self, optimizer: Optimizer, closure: Any) -> Generator[None, Any, Any]:
        clipped, self._clipped = self._clipped, None
        self._num_steps += 1
        if clipped is not None:
            self.last = clipped
        elif closure is None and self._context is not None and self._modules and self._num_steps % self.every == 0:
            self._context.hooks.precision_unscale(optimizer=optimizer)
            found = self._norm([p for group in optimizer.param_groups for p in group["params"]])
            self.last = found if found is not None else self.last
        return (yield)

    def _norm(self, parameters: Sequence[Tensor]) -> Tensor | None:
        wanted = set(map(id, parameters))
        modules = [module for module in (reference() for reference in self._modules) if module is not None]
        owner = next((m for m in modules if any(id(p) in wanted for p in m.parameters())), None)
        if owner is None or self._context is None:
            return None
        self._measures = True
        try:
            limits = {"max_norm": math.inf, "norm_type": self.norm_type, "error_if_nonfinite": False}
            norm: Tensor | None = self._context.hooks.strategy_clip_gradients(
                module=owner, parameters=parameters, clip_value=None, **limits
            )
        finally:
            self._measures = False
        return None if norm is None else norm.detach()

    @hookimpl
    def on_log(self, metrics: dict[str, float], step: int | None) -> None:
        if self.last is not None and "grad_norm" not in metrics:
            metrics["grad_norm"] = float(torch.as_tensor(self.last))
