"""Finding parameters and parts that are added to a model after it was sharded: nothing would average them."""

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


class Additions:
    """Watches the modules of models that were set up.

    A registration costs a look into a set; a forward and a step look at one attribute of the model's engine.
    """

    def __init__(self) -> None:
        self._owner: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Any]] = weakref.WeakKeyDictionary()
        self._handles: list[Any] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return Additions, ()  # a strategy that is sent to another process watches other models there

    def watch(self, module: nn.Module, engine: Any) -> None:
        """Mark ``engine.added`` where a parameter or part is added to `module`."""
        if not self._handles:
            self._handles = [
                register_module_parameter_registration_hook(self._parameter),
                register_module_module_registration_hook(self._module),
            ]
        for part in module.modules():
            self._owner[part] = weakref.ref(engine)

    def close(self) -> None:
        """Watch no more."""
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
    """Refuse trainable parameters that were added after set-up to a module none of whose parts is gathered.

    Raises:
        OrderError: naming them.
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
