"""Remove DeepSpeed's attributes from a module and its parameters."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe_builtins.deepspeed.library import library

#: Prefix of the names DeepSpeed adds only when the module runs.
_LATER = ("ds_", "_ds_", "_hp_grad", "post_bwd_fn", "applied_pre_backward_ref_cnt")


class Marks:
    """Record a module's attributes, to restore them later.

    Args:
        module: before DeepSpeed has changed it.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parts: list[nn.Module] = list(module.modules())
        self._parameters = list(module.parameters())
        self._dtypes = [parameter.dtype for parameter in self._parameters]
        self._objects: list[Any] = [*self._parts, *self._parameters]
        self._new: list[set[str]] = [set() for _ in self._objects]

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Record the attributes that DeepSpeed adds in this block."""
        before = [set(vars(obj)) for obj in self._objects]
        try:
            yield
        finally:
            for obj, old, new in zip(self._objects, before, self._new, strict=True):
                new |= set(vars(obj)) - old

    @torch.no_grad()
    def remove(self, full_values: Mapping[int, Tensor]) -> None:
        """Remove new attributes, and restore every parameter's storage and dtype.

        Args:
            full_values: by the parameter's id, full values of sharded parameters.
        """
        for obj, new in zip(self._objects, self._new, strict=True):
            for name in list(vars(obj)):
                if name in new or name.startswith(_LATER):
                    del vars(obj)[name]
        for part in self._parts:
            parameters = vars(part)["_parameters"]
            if type(parameters) is not dict:
                vars(part)["_parameters"] = dict(parameters.items())
        for parameter, dtype in zip(self._parameters, self._dtypes, strict=True):
            parameter.data = full_values.get(id(parameter), parameter.data).to(dtype, copy=True)
            parameter.grad = None


def forget_shim(shim: nn.Module) -> None:
    """Remove the module from DeepSpeed's list of running ones."""
    running: list[Any] = library("runtime.zero.parameter_offload").FWD_MODULE_STACK
    running[:] = [module for module in running if module is not shim]
