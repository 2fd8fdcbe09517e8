"""Agreement of the ranks on what a backward has come to: units, in which order, and parameters.

A part that ran on some ranks only has no gradient on the others, which counts as zeros there; one that ran on no rank
has none at all, as in one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.base import mark_gathered
from plugframe.errors import CollectiveMismatchError
from plugframe_builtins._shared.fully_shard.unit_order import Channel, Exchange

#: Bytes of the checksum that is sent before the flags.
_SUM = 4


class UsedParameters:
    """Which units and parameters of one model the backwards of the ranks have come to.

    Args:
        channel: to the other ranks.
        parameters: the sharded ones.
        owners: the module and the attribute of each.
        model: its class, for messages.
    """

    def __init__(
        self,
        channel: Channel,
        parameters: Sequence[nn.Parameter],
        owners: Sequence[tuple[nn.Module, str]],
        model: str,
    ) -> None:
        self._channel = channel
        self._parameters = parameters
        self._owners = owners
        self._model = model
        self._flags = bytearray(len(owners))
        self._watched: list[Tensor | None] = [None] * len(owners)
        self._empty: list[bool] = []
        self._order: list[int] = []
        self._pending: Exchange | None = None

    def watch(self, numbers: Sequence[int]) -> None:
        """Have parameters that are gathered now say when they get a gradient."""
        for number in numbers:
            owner, name = self._owners[number]
            parameter = owner._parameters[name]
            if parameter is self._watched[number] or parameter is None or not parameter.requires_grad:
                continue
            if not isinstance(parameter, DTensor) or parameter is not self._parameters[number]:
                mark_gathered(parameter)
                parameter.register_post_accumulate_grad_hook(self._note(number))  # type: ignore[no-untyped-call]
                self._watched[number] = parameter

    def _note(self, number: int) -> Callable[[Tensor], None]:
        flags = self._flags

        def note(_: Tensor) -> None:
            flags[number] = 1

        return note

    def come(self, unit: int) -> None:
        """The backward comes to a unit."""
        self._order.append(unit)

    def before(self) -> None:
        """A backward begins."""
        self.settle()
        self._order.clear()
        with torch._C.DisableTorchFunctionSubclass():
            self._empty = [parameter.grad is None for parameter in self._parameters]

    def after(self, ran: bool) -> None:
        """A backward that averages has ended: send what it came to.

        Args:
            ran: whether the model ran with gradients since the backward before; if not, and this one did not come to
                it, nothing is sent.
        """
        if not (ran or self._order or any(self._flags)):
            return
        order = zlib.crc32(repr(self._order).encode()).to_bytes(_SUM, "little")
        self._pending = self._channel.send(torch.frombuffer(bytearray(order + self._flags), dtype=torch.uint8))
        self._flags[:] = bytes(len(self._flags))

    def settle(self) -> None:
        """Wait for what the ranks have sent, and drop gradients of parameters that none came to: torch's zeros.

        Raises:
            CollectiveMismatchError: if the backwards of the ranks came to the units in different orders.
        """
        if self._pending is None:
            return
        exchange, self._pending = self._pending, None
        rows = exchange.wait()
        if not bool((rows[:, :_SUM] == rows[0, :_SUM]).all()):
            raise CollectiveMismatchError(
                f"The backwards of the ranks came to the parts of this {self._model} in different orders, so that "
                "their gradients are mixed: compute the loss from the same parts on every rank (weigh an unused one "
                "with 0)."
            )
        used = rows[:, _SUM:].amax(0)
        if bool(used.all()):
            return
        for parameter, came, empty in zip(self._parameters, used.tolist(), self._empty, strict=True):
            if not came and empty:
                parameter.grad = None


def owned_parameters(module: nn.Module) -> tuple[list[nn.Parameter], list[tuple[nn.Module, str]]]:
    """Return every parameter once, and the module and attribute that hold it."""
    found: dict[int, tuple[nn.Parameter, tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                found.setdefault(id(parameter), (parameter, (part, name)))
    return [parameter for parameter, _ in found.values()], [owner for _, owner in found.values()]
