"""Detect parameters and submodules added to a model after it was sharded: their gradients are not averaged."""

from __future__ import annotations

import weakref
from typing import Any

from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.module import (
    register_module_module_registration_hook,
    register_module_parameter_registration_hook,
)

from plugframe.errors import OrderError


class AddedParameters:
    """Detect registrations in modules that were set up.

    A registration costs a set lookup; a forward and a step read one attribute of the model's engine.
    """

    def __init__(self) -> None:
        self._owner: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return AddedParameters, ()  # a strategy unpickled in another process has other models

    def watch(self, module: nn.Module, engine: Any) -> None:
        """Set ``engine.added`` when a parameter or submodule is added to `module`."""
        if not self._handles:
            self._handles = [
                register_module_parameter_registration_hook(self._parameter),
                register_module_module_registration_hook(self._module),
            ]
        for part in module.modules():
            self._owner[part] = weakref.ref(engine)

    def close(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._owner.clear()

    def _parameter(self, module: nn.Module, name: str, parameter: Any) -> None:
        if module in self._owner and isinstance(parameter, nn.Parameter) and not isinstance(parameter, DTensor):
            self._mark(module)

    def _module(self, module: nn.Module, name: str, part: Any) -> None:
        if module in self._owner and isinstance(part, nn.Module) and part not in self._owner:
            self._mark(module)

    def _mark(self, module: nn.Module) -> None:
        engine = self._owner[module]()
        if engine is not None:
            engine.added = True


def check_added(module: nn.Module, strategy: str) -> None:
    """Raise if trainable parameters were added after set-up outside of every sharded unit.

    Raises:
        OrderError: naming the parameters.
    """
    found = [
        path
        for path, parameter in module.named_parameters(remove_duplicate=False)
        if not isinstance(parameter, DTensor) and parameter.requires_grad
    ]
    if found:
        shown = ", ".join(map(repr, found[:3])) + (f" and {len(found) - 3} more" if len(found) > 3 else "")
        raise OrderError(
            f"{shown} of this {type(module).__name__} came after lite.setup(): strategy {strategy!r} shards and "
            "averages what it finds at set-up. Change the model before it is set up."
        )
