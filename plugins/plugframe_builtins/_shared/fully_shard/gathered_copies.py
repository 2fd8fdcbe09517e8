"""Changes of parameters while they are gathered, which would be lost."""

from __future__ import annotations

from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.errors import OrderError


class GatheredCopies:
    """Parameters that stay gathered from a forward to its backward, those outside of units.

    What is written to them is written to a copy, and would be lost: their version counters tell.
    """

    def __init__(self, module: nn.Module) -> None:
        self._homes = [(path, part) for path, part in module.named_modules() if part._parameters]
        self._versions: list[tuple[str, Tensor, int]] = []

    def note(self) -> None:
        """A forward has ended."""
        self._versions = [
            (f"{path}.{name}".lstrip("."), parameter, parameter._version)
            for path, part in self._homes
            for name, parameter in part._parameters.items()
            if parameter is not None and not isinstance(parameter, DTensor)
        ]

    def forget(self) -> None:
        """They are gathered no more."""
        self._versions = []

    def check(self) -> None:
        """Refuse changes.

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
