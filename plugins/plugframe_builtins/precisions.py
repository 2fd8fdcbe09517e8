"""The precisions: a single dtype, or float32 parameters with 16-bit arithmetic."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer

from plugframe.base import Precision, cast_floating, default_dtype
from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.loss_scale import LossScale


class FullPrecision(Precision):
    """Float32, torch's default: nothing is converted, so modules in other dtypes stay so."""


class TruePrecision(Precision):
    """Module and inputs in one dtype; outputs in torch's default dtype, for the loss.

    Args:
        dtype: ``"float16"``, ``"bfloat16"`` or ``"float64"``, or the ``torch.dtype``.
    """

    def __init__(self, dtype: str | torch.dtype) -> None:
        self.parameter = self.compute = _dtype(dtype, torch.float16, torch.bfloat16, torch.float64)

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        # Not module.to(dtype), which makes complex parameters real.
        if self.parameter is torch.float16:
            return module.half()
        return module.bfloat16() if self.parameter is torch.bfloat16 else module.double()

    @hookimpl
    def precision_convert_input(self, data: Any) -> Any:
        return cast_floating(data, self.compute)

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        # Tensors created in a forward must have the parameters' dtype.
        return default_dtype(self.compute)


class MixedPrecision(Precision):
    """Float32 parameters, forwards under autocast; a loss scaler prevents float16 gradients from underflowing.

    Args:
        dtype: of the arithmetic: ``"float16"`` or ``"bfloat16"``, or the ``torch.dtype``.
        scaler: a custom loss scaler; by default float16 has one with torch's settings, and bfloat16 none.
    """

    def __init__(self, dtype: str | torch.dtype, *, scaler: GradScaler | None = None) -> None:
        self.compute = _dtype(dtype, torch.float16, torch.bfloat16)
        self.scaler = scaler
        self._autocast_type = ""
        self._loss_scale: LossScale | None = None
        self._was_fused = False

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        super().precision_setup(context)
        self._autocast_type = context.hooks.accelerator_autocast_type()
        scaler = self.scaler or (GradScaler(self._autocast_type) if self.compute is torch.float16 else None)
        if scaler is not None and scaler.is_enabled():
            self._loss_scale = LossScale(scaler)

    @hookimpl
    def precision_teardown(self) -> None:
        if self._loss_scale is not None:
            self._loss_scale.close()
        self._loss_scale = None
        if self._was_fused:
            torch.backends.mha.set_fastpath_enabled(True)
            self._was_fused = False

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        if self._autocast_type != "cuda":
            self._disable_fused_attention(module)
        if self.compute is torch.float16 and self._autocast_type == "cpu":
            self._check_lstm(module)
        if self._loss_scale is not None:
            if any(p.requires_grad and p.dtype is torch.float16 for p in module.parameters()):
                raise UnsupportedError(
                    f"precision={self._name!r} trains float32 parameters, and this {type(module).__name__} has "
                    "float16 ones: leave out its .half(), or use precision='16-true'."
                )
            self._loss_scale.watch(module)
        return module

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._autocast_type, self.compute)

    @hookimpl
    def precision_backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._loss_scale is not None:
            loss = self._loss_scale.scale(loss)
        super().precision_backward(loss, args, kwargs)

    @hookimpl
    def precision_finish_backward(self) -> None:
        if self._loss_scale is not None:
            self._loss_scale.finish()

    @hookimpl
    def precision_setup_optimizer(self, optimizer: Optimizer) -> None:
        if self._loss_scale is not None:
            self._loss_scale.watch_optimizer(optimizer)

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        if self._loss_scale is None:
            return super().precision_optimizer_step(optimizer, step, closure)
        if closure is not None:
            raise UnsupportedError(
                f"precision={self._name!r} scales the loss, and the closure {type(optimizer).__name__}.step() was "
                "given cannot be re-evaluated under a loss scaler: use precision='bf16-mixed' or '32-true'."
            )
        return self._loss_scale.step(optimizer, step)

    @hookimpl
    def precision_unscale(self, optimizer: Optimizer) -> bool:
        if self._loss_scale is None:
            return False
        self._loss_scale.unscale(optimizer)
        return True

    @hookimpl
    def precision_state(self) -> dict[str, Any]:
        return {} if self._loss_scale is None else self._loss_scale.state()

    @hookimpl
    def precision_load_state(self, state: dict[str, Any]) -> None:
        # Empty: saved in a precision without loss scaling; the current scale stays as initialised.
        if self._loss_scale is not None and state:
            self._loss_scale.load(state)

    def _disable_fused_attention(self, module: nn.Module) -> None:
        """Disable the fused evaluation of torch's transformer layers until tear-down.

        A hack: they take it unless autocast is enabled, look for that of CUDA only, and fail on the dtypes of another
        (torch 2.13, ``TransformerEncoderLayer.forward``). Disabled in each forward, it would end compiled graphs.
        """
        if any(isinstance(child, nn.MultiheadAttention) for child in module.modules()):
            self._was_fused |= torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)

    def _check_lstm(self, module: nn.Module) -> None:
        names = [name for name, child in module.named_modules() if isinstance(child, nn.LSTM)]
        if names and not _trains_lstm(self.compute):
            raise UnsupportedError(
                f"precision={self._name!r} does not support the LSTM {names[0]!r} of {type(module).__name__} on cpu, "
                "where torch has no training of LSTMs in float16: use precision='bf16-mixed'."
            )

    @property
    def _name(self) -> str:
        return self.context.names["precision"]


@functools.cache
def _trains_lstm(dtype: torch.dtype) -> bool:
    """Return whether an LSTM trains under autocast of the CPU: oneDNN has no such kernel for some dtypes and CPUs."""
    with torch.random.fork_rng(devices=()), torch.enable_grad(), torch.autocast("cpu", dtype):
        try:
            nn.LSTM(4, 4)(torch.zeros(1, 1, 4))
        except RuntimeError:
            return False
    return True


def _dtype(dtype: str | torch.dtype, *allowed: torch.dtype) -> torch.dtype:
    for known in allowed:
        if dtype in (known, str(known).removeprefix("torch.")):
            return known
    names = ", ".join(repr(str(known).removeprefix("torch.")) for known in allowed)
    raise SettingError(f"dtype={dtype!r} is not a dtype of this precision: use one of {names}.")
