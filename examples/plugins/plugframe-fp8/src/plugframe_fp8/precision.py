"""The precision: bfloat16 autocast, in which linear layers work on 8-bit numbers."""

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
    """Parameters in float32, forwards under bfloat16 autocast, linear layers in fp8 with a scale for each tensor.

    What enters a linear layer is rounded to fp8: inputs and weights to e4m3, gradients to e5m2, as proposed in
    Micikevicius et al., "FP8 Formats for Deep Learning", 2022, arXiv:2209.05433. Each tensor is scaled so that its
    greatest number is the format's; products are added up in more bits. What is kept for backward is kept in fp8.

    The arithmetic is that of fp8 hardware, the speed is not: numbers are multiplied as bfloat16.

    A checkpointed part of a model must be computed again as it was before::

        checkpoint(block, x, use_reentrant=False, context_fn=lambda: (nullcontext(), lite.autocast()))

    Args:
        gradients: the format of gradients, ``"e5m2"`` or ``"e4m3"``.
    """

    compute = torch.bfloat16

    def __init__(self, *, gradients: str = "e5m2") -> None:
        if gradients not in FORMATS:
            raise SettingError(f"gradients={gradients!r} is no format: use one of {', '.join(map(repr, FORMATS))}.")
        self.gradients = gradients
        self._autocast_type = ""

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        super().precision_setup(context)
        self._autocast_type = context.hooks.accelerator_autocast_type()

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        return self._in_fp8()

    @contextmanager
    def _in_fp8(self) -> Iterator[None]:
        with torch.autocast(self._autocast_type, self.compute), _Linears(self._autocast_type, FORMATS[self.gradients]):
            yield

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return cast_floating(data, torch.get_default_dtype())


class _Linears(TorchFunctionMode):
    """Has every linear layer computed in fp8 where autocast is on. The modules themselves are not touched."""

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
