"""Broadcast tensors from the first rank of a process group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch.distributed as dist
from torch import Tensor

from plugframe.utils.broadcast import broadcast_tensors


def broadcast_from_first(tensors: Iterable[Tensor], group: Any) -> None:
    """Overwrite `tensors` on all ranks of `group` with the values of its first rank. All ranks must call it.

    Args:
        tensors: see `plugframe.utils.broadcast.broadcast_tensors`.
        group: the process group.
    """
    if dist.get_world_size(group) == 1:
        return
    source = dist.get_global_rank(group, 0)

    def broadcast(tensor: Tensor) -> Tensor:
        dist.broadcast(tensor, source, group=group)
        return tensor

    broadcast_tensors(tensors, broadcast, is_source=dist.get_rank(group) == 0)
