"""The base class of precisions: one dtype for parameters and one for compute, float32 by default."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe.errors import UnsupportedError
from plugframe.hooks import Dtypes, PrecisionSpec, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.movable import map_data


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Make `dtype` torch's default for new floating-point tensors, and restore the old one on exit."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_floating(data: Any, dtype: torch.dtype) -> Any:
    """Return `data` (any nesting) with its floating-point tensors in `dtype`."""

    def cast(tensor: Tensor) -> Tensor:
        return tensor.to(dtype) if tensor.is_floating_point() else tensor

    return map_data(cast, data)


class Precision(PrecisionSpec):
    """Base class of precisions: set the two dtypes, override hooks and mark them with ``@hookimpl``.

    Attributes:
        parameter: dtype of the parameters.
        compute: dtype of the arithmetic.
    """

    parameter: torch.dtype = torch.float32
    compute: torch.dtype = torch.float32
    context: Context

    @hookimpl
    def precision_setup(self, context: Context) -> None:
        self.context = context
        for dtype in dict.fromkeys((self.parameter, self.compute)):
            if not context.hooks.accelerator_supports_dtype(dtype=dtype, device=context.device):
                raise UnsupportedError(
                    f"precision={context.names['precision']!r} needs {dtype}, which {context.device} does not "
                    f"compute in. Choose another precision; '32-true' works everywhere."
                )

    @hookimpl
    def precision_teardown(self) -> None:
        pass

    @hookimpl
    def precision_dtypes(self) -> Dtypes:
        return Dtypes(parameter=self.parameter, compute=self.compute)

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        return module

    @hookimpl
    def precision_finalize(self, module: nn.Module) -> nn.Module:
        return module

    @hookimpl
    def precision_convert_input(self, data: Any) -> Any:
        return data

    @hookimpl
    def precision_convert_output(self, data: Any) -> Any:
        return data

    @hookimpl
    def precision_forward_context(self) -> AbstractContextManager[Any]:
        return nullcontext()

    @hookimpl
    def precision_init_context(self) -> AbstractContextManager[Any]:
        return default_dtype(self.parameter)

    @hookimpl
    def precision_backward(self, loss: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        loss.backward(*args, **kwargs)  # type: ignore[no-untyped-call]

    @hookimpl
    def precision_finish_backward(self) -> None:
        pass

    @hookimpl
    def precision_setup_optimizer(self, optimizer: Optimizer) -> None:
        pass

    @hookimpl
    def precision_optimizer_step(
        self, optimizer: Optimizer, step: Callable[..., Any], closure: Callable[[], Any] | None
    ) -> Any:
        return step() if closure is None else step(closure)

    @hookimpl
    def precision_unscale(self, optimizer: Optimizer) -> bool:
        return False

    @hookimpl
    def precision_state(self) -> dict[str, Any]:
        return {}

    @hookimpl
    def precision_load_state(self, state: dict[str, Any]) -> None:
        pass
