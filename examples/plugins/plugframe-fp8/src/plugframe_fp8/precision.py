"""The precision: bfloat16 autocast, with linear layers in fp8."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from plugframe.base import Precision, cast_floating
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_fp8.linear import FORMATS, Fp8Linear


class Fp8Mixed(Precision):
    """Parameters in float32, forwards under bfloat16 autocast, linear layers in fp8 with per-tensor scales.

    The operands of linear layers are rounded to fp8: inputs and weights to e4m3, gradients to e5m2, as proposed in
    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433. Each tensor is scaled so that its
    largest magnitude is the maximum of the format; products are accumulated in higher precision. Tensors are saved for
    backward in fp8.

    The results are those of fp8 hardware, the speed is not: numbers are multiplied as bfloat16.

    Recompute checkpointed activations under the same autocast::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), lite.autocast()))

    Args:
        gradients: format of gradients, ``"e5m2"`` or ``"e4m3"``.
    """

    compute = torch.bfloat16

    def __init__(self, *, gradients: str = "e5m2") -> None:
        if gradients not in FORMATS:
            raise SettingError(f"gradients={gradients!r} is not a format: use one of {', '.join(map(repr, FORMATS))}.")
        self.gradients = gradients
        self._autocast_type = ""

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        super().precision_setup(context)
        self._autocast_type = context.hooks.accelerator_autocast_type()

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        return self._fp8_context()

    @contextmanager
    def _fp8_context(self) -> Iterator[None]:
        with (
            torch.autocast(self._autocast_type, self.compute),
            _Fp8LinearMode(self._autocast_type, FORMATS[self.gradients]),
        ):
            yield

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())


class _Fp8LinearMode(TorchFunctionMode):
    """Run linear layers in fp8 where autocast is enabled, without changing the modules."""

    def __init__(self, autocast_type: str, gradients: torch.dtype) -> None:
        super().__init__()
        self._autocast_type, self._gradients = autocast_type, gradients

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is functional.linear and torch.is_autocast_enabled(self._autocast_type):
            return self._linear(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.dim() != 2 or not (input.is_floating_point() and weight.is_floating_point()):
            return functional.linear(input, weight, bias)
        output: Tensor = Fp8Linear.apply(input, weight, self._gradients)  # type: ignore[no-untyped-call]
        return output if bias is None else output + bias.to(output.dtype)
