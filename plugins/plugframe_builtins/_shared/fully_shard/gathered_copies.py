"""Detect changes to parameters while they are gathered, which would be lost."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.errors import OrderError


class GatheredCopies:
    """Parameters outside of units, which stay gathered from a forward to its backward.

    Writes go to the gathered copy and would be lost; tensor version counters detect them.
    """

    def __init__(self, module: nn.Module) -> None:
        self._homes = [(path, part) for path, part in module.named_modules() if part._parameters]
        self._versions: list[tuple[str, Tensor, int]] = []

    def note(self) -> None:
        """Record versions at the end of a forward."""
        self._versions = [
            (f"{path}.{name}".lstrip("."), parameter, parameter._version)
            for path, part in self._homes
            for name, parameter in part._parameters.items()
            if parameter is not None and not isinstance(parameter, DTensor)
        ]

    def forget(self) -> None:
        """Forget the versions, when the parameters are resharded."""
        self._versions = []

    def check(self) -> None:
        """Raise if a gathered parameter was changed.

        Raises:
            OrderError: naming the parameter.
        """
        for name, parameter, version in self._versions:
            if parameter._version != version:
                self._versions = []
                raise OrderError(
                    f"Parameter {name!r} was changed between a forward and its backward, while it was gathered: the "
                    "change would be lost. Change it after optimizer.step(), or run that forward under torch.no_grad()."
                )
