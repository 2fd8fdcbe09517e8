"""Collectives over nested data: one shape law for any number of ranks."""

from __future__ import annotations

import copy
import dataclasses
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from plugframe.base.tree import map_tensors
from plugframe.errors import CollectiveMismatchError, SettingError


def to_tensors(data: Any, device: torch.device, call: str) -> Any:
    """Return `data` with its numbers and arrays as tensors on `device`; tensors stay where they are.

    Raises:
        SettingError: for anything that is neither, and for a tensor spread over ranks, naming its type.
    """
    if isinstance(data, Tensor):
        if hasattr(data, "full_tensor"):
            raise SettingError(
                f"{call}() got a {type(data).__name__}, of which every rank has a part: pass .full_tensor(), or "
                ".to_local() for the part."
            )
        return data
    if isinstance(data, (bool, int, float, complex)):
        return torch.tensor(data, device=device)
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(data, (numpy.ndarray, numpy.generic)):
        return torch.as_tensor(data, device=device)
    if isinstance(data, Mapping):
        values = {key: to_tensors(value, device, call) for key, value in data.items()}
        return values if type(data) is dict else _like(data, values)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        return type(data)(*(to_tensors(value, device, call) for value in data))
    if isinstance(data, (list, tuple)):
        return type(data)(to_tensors(value, device, call) for value in data)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        made = copy.copy(data)
        for field in dataclasses.fields(data):
            object.__setattr__(made, field.name, to_tensors(getattr(data, field.name), device, call))
        return made
    raise SettingError(
        f"{call}() takes tensors, numbers, arrays, and dicts, lists and tuples of them, got {type(data).__name__}; "
        "for other objects use lite.broadcast()."
    )


def _like(data: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the user's own class, with what else it holds, and `values`."""
    made: Any = copy.copy(data)
    for key, value in values.items():
        made[key] = value
    return made


def each(fn: Callable[[Tensor], Tensor], data: Any, device: torch.device, call: str) -> Any:
    """Apply a collective to every leaf of `data`, in the same order on every rank."""
    return map_tensors(fn, to_tensors(data, device, call))


def padded(tensor: Tensor, value: float, hooks: Any, group: Any) -> Tensor:
    """Return `tensor` filled up with `value` to the largest shape that any rank of the group has.

    Raises:
        CollectiveMismatchError: on all ranks, if they have different numbers of dimensions.
    """
    shapes = hooks.collective_all_gather_object(obj=tuple(tensor.shape), group=group)
    if len({len(shape) for shape in shapes}) > 1:
        raise CollectiveMismatchError(
            f"all_gather(pad=…) fills up tensors of as many dimensions, got shapes {', '.join(map(str, shapes))}."
        )
    missing = [max(sizes) - own for *sizes, own in zip(*shapes, tensor.shape, strict=True)]
    pairs = [part for size in reversed(missing) for part in (0, size)]
    return torch.nn.functional.pad(tensor, pairs, value=value) if any(missing) else tensor


def off_device(data: Any) -> Any:
    """Return `data` with its tensors on the CPU, to be sent as an object."""
    return map_tensors(lambda tensor: tensor.detach().cpu(), data)


def on_device(data: Any, device: torch.device) -> Any:
    """Return `data` with its tensors on `device`."""
    return map_tensors(lambda tensor: tensor.to(device), data)
