"""Compare over ranks which units, in which order, and which parameters a backward used.

A parameter used on some ranks only counts as zero gradient on the others; one used on no rank
has no gradient, as in one process.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.base import mark_gathered
from plugframe.errors import CollectiveMismatchError
from plugframe_builtins._shared.fully_shard.unit_order import Channel, Exchange

#: Bytes of the checksum sent before the flags.
_SUM = 4


class UsedParameters:
    """The units and parameters of one model that backwards reached, over all ranks.

    Args:
        channel: communicates with the other ranks.
        parameters: the sharded parameters.
        owners: module and attribute name of each.
        model: class name, for messages.
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
        """Add gradient hooks to the gathered parameters."""
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

    def record(self, unit: int) -> None:
        """Record that the backward reached a unit."""
        self._order.append(unit)

    def before(self) -> None:
        """Start a backward."""
        self.settle()
        self._order.clear()
        with torch._C.DisableTorchFunctionSubclass():
            self._empty = [parameter.grad is None for parameter in self._parameters]

    def after(self, ran: bool) -> None:
        """End a backward that averages, and send the units and parameters it used.

        Args:
            ran: whether the model ran with gradients since the previous backward; if not, and this one did not
                reach it, nothing is sent.
        """
        if not (ran or self._order or any(self._flags)):
            return
        order = zlib.crc32(repr(self._order).encode()).to_bytes(_SUM, "little")
        self._pending = self._channel.send(torch.frombuffer(bytearray(order + self._flags), dtype=torch.uint8))
        self._flags[:] = bytes(len(self._flags))

    def settle(self) -> None:
        """Wait for all ranks, and drop the zero gradients torch creates for parameters that no rank used.

        Raises:
            CollectiveMismatchError: if the ranks' backwards reached units in different orders.
        """
        if self._pending is None:
            return
        exchange, self._pending = self._pending, None
        rows = exchange.wait()
        if not bool((rows[:, :_SUM] == rows[0, :_SUM]).all()):
            raise CollectiveMismatchError(
                f"The backwards of the ranks reached the submodules of this {self._model} in different orders, so that "
                "their gradients are mixed: compute the loss from the same submodules on every rank (weigh an "
                "unused one with 0)."
            )
        used = rows[:, _SUM:].amax(0)
        if bool(used.all()):
            return
        for parameter, reached, empty in zip(self._parameters, used.tolist(), self._empty, strict=True):
            if not reached and empty:
                parameter.grad = None


def owned_parameters(
    module: nn.Module, apart: Collection[nn.Parameter] = ()
) -> tuple[list[nn.Parameter], list[tuple[nn.Module, str]]]:
    """Return every parameter once, except those in `apart`, with the module and attribute that hold it."""
    found: dict[int, tuple[nn.Parameter, tuple[nn.Module, str]]] = {}
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter not in apart:
                found.setdefault(id(parameter), (parameter, (part, name)))
    return [parameter for parameter, _ in found.values()], [owner for _, owner in found.values()]
