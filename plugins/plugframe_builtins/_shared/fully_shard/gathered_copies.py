"""Detect changes to parameters while they are gathered, which would be lost."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.errors import OrderError
from plugframe_builtins._shared.fully_shard.gathered_gradient import hide, show


class GatheredCopies:
    """Parameters outside of units, which stay gathered from a forward to its backward.

    Writes go to the gathered copy and would be lost; tensor version counters detect them. Their gradients are those of
    the shards, until the next forward or backward.

    Args:
        module: the module, sharded.
    """

    def __init__(self, module: nn.Module) -> None:
        self._homes = [(path, part) for path, part in module.named_modules() if part._parameters]
        self._versions: list[tuple[str, Tensor, int]] = []
        self._shards = {
            (path, name): parameter
            for path, part in self._homes
            for name, parameter in part._parameters.items()
            if isinstance(parameter, DTensor)
        }
        self._shown: list[Tensor] = []

    def note(self) -> None:
        """Record versions at the end of a forward."""
        self._versions = [
            (f"{path}.{name}".lstrip("."), parameter, parameter._version)
            for path, part in self._homes
            for name, parameter in part._parameters.items()
            if parameter is not None and not isinstance(parameter, DTensor)
        ]
        with torch._C.DisableTorchFunctionSubclass():
            averaged = any(shards.grad is not None for shards in self._shards.values())
        if averaged:
            self._show_gradients()

    def _show_gradients(self) -> None:
        for path, part in self._homes:
            for name, parameter in part._parameters.items():
                shards = self._shards.get((path, name))
                if parameter is not None and shards is not None and show(parameter, shards):
                    self._shown.append(parameter)

    def forget(self) -> None:
        """Forget the versions, when the parameters are resharded."""
        self._versions = []
        self._hide_gradients()

    def _hide_gradients(self) -> None:
        for parameter in self._shown:
            hide(parameter)
        self._shown.clear()

    def check(self) -> None:
        """Raise if a gathered parameter was changed.

        Raises:
            OrderError: naming the parameter.
        """
        self._hide_gradients()
        for name, parameter, version in self._versions:
            if parameter._version != version:
                self._versions = []
                raise OrderError(
                    f"Parameter {name!r} was changed between a forward and its backward, while it was gathered: the "
                    "change would be lost. Change it after optimizer.step(), or run that forward under torch.no_grad()."
                )
