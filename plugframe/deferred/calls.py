"""A dispatched tensor operation, and properties derived from its name, schema and arguments."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from plugframe.deferred.history import Generator, flatten, record_of

#: Random fills: they draw the same numbers whatever the tensor holds, and overwrite all of it.
_RANDOM_FILLS = frozenset(
    f"aten::{name}_" for name in ("normal", "uniform", "exponential", "geometric", "cauchy", "log_normal", "random")
)
#: Operations that overwrite all values of their first argument.
_FILLS = _RANDOM_FILLS | {"aten::zero_", "aten::fill_", "aten::copy_"}
_NEEDS_VALUES = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})


class Call:
    """A dispatched operation, before it runs."""

    def __init__(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.func, self.args, self.kwargs = func, args, kwargs
        self.name: str = func._schema.name
        self.seeded = torch.Tag.nondeterministic_seeded in func.tags
        self.tensors: list[Tensor] = [leaf for leaf in flatten((args, kwargs)) if isinstance(leaf, Tensor)]
        self.records = [record for record in map(record_of, self.tensors) if record is not None]
        #: Whether only the shape of its tensor argument matters.
        self.shape_only = bool(args) and (self.name.startswith("aten::new_") or self.name.endswith("_like"))
        self.shape_only = self.shape_only and len(self.tensors) == 1
        takes_device = any(argument.name == "device" for argument in func._schema.arguments)
        self.makes_only = takes_device and (self.shape_only or not self.tensors)

    @cached_property
    def written(self) -> list[Tensor]:
        """The tensors it writes to."""
        values: list[Any] = []
        for position, argument in enumerate(self.func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = self.args[position] if position < len(self.args) else self.kwargs.get(argument.name)
                values.extend(flatten(value))
        return [value for value in values if isinstance(value, Tensor)]

    @cached_property
    def device(self) -> torch.device:
        """The device of its results in an eager build."""
        asked = self.kwargs.get("device")
        if asked is not None and not (self.records and torch.device(asked).type == "meta"):
            return exact(asked)
        with_shape = [t for t in self.tensors if t.dim()] or self.tensors
        if not with_shape:
            return torch.device("cpu")
        record = record_of(with_shape[0])
        if record is not None:
            return record.device
        return self.records[0].device if with_shape[0].is_meta and self.records else with_shape[0].device

    @property
    def needs_values(self) -> bool:
        """Whether it requires values, and cannot run on the meta device."""
        if not _NEEDS_VALUES.isdisjoint(self.func.tags) or any(record_of(t) is None for t in self.written):
            return True
        return self.seeded and not (self.name in _RANDOM_FILLS and len(self.tensors) == 1)

    def states(self) -> list[tuple[Generator, Tensor]]:
        """Return the generator it draws from, with its current state; empty if it draws nothing.

        Nothing is drawn for a tensor that was made on the meta device, such as one to be loaded from a file.
        """
        if not self.seeded or self.device.type == "meta":
            return []
        own = next((leaf for leaf in flatten((self.args, self.kwargs)) if isinstance(leaf, torch.Generator)), None)
        generator = Generator(self.device, own)
        return [(generator, generator.state())]

    def covers(self) -> int | None:
        """Return the size in bytes of the one storage that it overwrites completely; None if there is none."""
        if self.name not in _FILLS or (self.written[0] is not self.args[0]):
            return None
        target: Tensor = self.args[0]
        size_bytes: int = target.untyped_storage().nbytes()
        if sum(record is record_of(target) for record in self.records) > 1:
            return None
        if target.numel() * target.element_size() != size_bytes:
            return None
        expected = 1
        for stride, size in sorted(zip(target.stride(), target.size(), strict=True)):
            if size != 1 and stride != expected:
                return None
            expected *= size
        return size_bytes


def exact(device: torch.device | str | int) -> torch.device:
    """Return the device with its index, as ``tensor.device`` gives it."""
    device = torch.device(device)
    return device if device.type in ("cpu", "meta") else torch.empty(0, device=device).device
