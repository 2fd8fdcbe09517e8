"""Precisions that break one rule each: parameters in float32, arithmetic in float16, the loss scaled."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.precisions import MixedPrecision

SHARED = GradScaler("cpu")


class Right(MixedPrecision):
    """Breaks none."""

    def __init__(self) -> None:
        super().__init__("float16")


class Full(Right):
    """Computes in float32 all the same."""

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()


class Copies(Right):
    """Converts a copy of the module."""

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        return super().precision_convert_module(copy.deepcopy(module))


class Unlisted(Right):
    """Replaces linear layers, which its descriptor does not list."""

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        for part in module.modules():
            if type(part) is nn.Linear:
                part.__class__ = _Other
        return super().precision_convert_module(module)


class _Other(nn.Linear):
    pass


class Halves(Right):
    """Converts whole numbers as well."""

    @hookimpl
    def precision_convert_input(self, data: Any) -> Any:
        return map_tensors(torch.Tensor.half, data)


class Raw(Right):
    """Returns what the forward computed in."""

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return data


class Settles(Right):
    """Computes in another dtype where the device has not the one that was asked for."""

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        try:
            super().precision_setup(context)
        except UnsupportedError:
            self.compute = torch.float32


class Scaled(Right):
    """Leaves the gradients as they were scaled."""

    @hookimpl
    def precision_unscale(self, optimizer: Optimizer) -> bool:
        return True


class Twice(Right):
    """Makes two steps of one."""

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        super().precision_optimizer_step(optimizer, step, closure)
        return super().precision_optimizer_step(optimizer, step, closure)


class Steps(Right):
    """Steps on gradients that are not finite."""

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        self.precision_unscale(optimizer)
        return step()


class Drops(Right):
    """Steps without the closure."""

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        return super().precision_optimizer_step(optimizer, step, None)


class Forgets(Right):
    """Takes no state back."""

    @hookimpl
    def precision_load_state(self, state: dict[str, Any]) -> None:
        pass


class Common(Right):
    """Has one scale for all of its objects."""

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        self.scaler = SHARED
        super().precision_setup(context)


class Stands(Right):
    """Makes no step."""

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        return None


class Leaves(Right):
    """Lets float32 products be rounded from then on."""

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        super().precision_setup(context)
        torch.set_float32_matmul_precision("high")
