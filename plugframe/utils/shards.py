"""Helpers for ``DTensor`` shards."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import TypeGuard

    from torch.distributed.tensor import DTensor


def is_shard(value: Any) -> TypeGuard[DTensor]:
    """Return whether `value` is a ``DTensor``."""
    # The import is slow, and unnecessary: a DTensor can only exist if its module is loaded.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(value: Tensor) -> Tensor:
    """Return the local shard of a ``DTensor``, any other tensor unchanged."""
    return value.to_local() if is_shard(value) else value


def view_locally(value: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``view(value)``, applied to the local shard of a ``DTensor``; `view` may only append dimensions."""
    if not is_shard(value):
        return view(value)
    from torch.distributed.tensor import DTensor

    before = value.to_local()
    local = view(before)
    if local is before:
        return value
    shape = torch.Size((*value.shape, *local.shape[before.dim() :]))
    # On the meta device: the full tensor may not fit in memory.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, value.device_mesh, value.placements, run_check=False, shape=shape, stride=stride)
