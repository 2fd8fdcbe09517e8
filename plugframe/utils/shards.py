"""Tensors of which this rank has a part: telling them from others, and looking at the part another way."""

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
    """Say whether `value` is a ``DTensor``."""
    # It takes long to import: who has one has imported it.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def local_of(value: Tensor) -> Tensor:
    """Return this rank's part of a ``DTensor``, any other tensor as it is."""
    return value.to_local() if is_shard(value) else value


def view_locally(value: Tensor, view: Callable[[Tensor], Tensor]) -> Tensor:
    """Return ``view(value)``, of a ``DTensor`` with its part so viewed; the view may only append dimensions."""
    if not is_shard(value):
        return view(value)
    from torch.distributed.tensor import DTensor

    before = value.to_local()
    local = view(before)
    if local is before:
        return value
    shape = torch.Size((*value.shape, *local.shape[before.dim() :]))
    # Not of torch.empty(shape): not even for a moment is there memory for the whole.
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, value.device_mesh, value.placements, run_check=False, shape=shape, stride=stride)
