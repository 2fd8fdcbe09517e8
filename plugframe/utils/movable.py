"""Move and cast data: tensors in containers, and objects with a ``to`` of their own, such as a batch of graphs."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.utils.tree import map_leaves


class _MovableType(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        # Containers are mapped by their contents; modules are not data.
        if isinstance(instance, (Tensor, nn.Module, Mapping, list, tuple, type)) or dataclasses.is_dataclass(instance):
            return False
        return callable(getattr(instance, "to", None))


class Movable(metaclass=_MovableType):
    """The type of objects with a method ``to(device)``, other than tensors, modules and containers."""


def move_data(data: Any, device: torch.device | str | int) -> Any:
    """Return `data` on `device`: every tensor, and every object by its own ``to(device)``."""

    def move(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            # A copy from pinned memory overlaps with compute. From pageable memory non_blocking gains nothing, and a
            # copy back to the host could be read too early.
            return leaf.to(device, non_blocking=leaf.device.type == "cpu" and leaf.is_pinned())
        moved = leaf.to(device)
        return leaf if moved is None else moved  # an object may move in place

    return map_leaves(move, data, (Tensor, Movable))


def map_data(fn: Callable[[Tensor], Tensor], data: Any) -> Any:
    """Return `data` with ``fn(tensor)`` in place of every tensor, those in objects with ``to`` and ``apply`` included.

    Such an object is copied before, because its ``apply`` may change it in place.
    """

    def apply(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return fn(leaf)
        if not callable(getattr(leaf, "apply", None)):
            return leaf
        copied = copy.copy(leaf)
        applied = copied.apply(fn)
        return copied if applied is None else applied

    return map_leaves(apply, data, (Tensor, Movable))
