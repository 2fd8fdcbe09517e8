"""Buffers that forwards change (running statistics), kept equal on all ranks."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.utils.broadcast import broadcast_tensors
from plugframe.utils.shards import is_shard


def replicated_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers that are kept equal on all ranks, each once: all that a forward may change.

    As under torch's ``DistributedDataParallel``, whether a checkpoint holds them (``persistent=True``) does not
    matter. Left out are those that are split over ranks, not dense, or empty.
    """
    dense = (buffer for buffer in module.buffers() if buffer.layout is torch.strided and buffer.numel())
    return [buffer for buffer in dense if not is_shard(buffer)]


def sync_buffers(module: nn.Module, hooks: Any) -> None:
    """Give every rank rank 0's `replicated_buffers`. Every rank must call it."""
    broadcast = functools.partial(hooks.collective_broadcast, src=0, group=None)
    broadcast_tensors(replicated_buffers(module), lambda tensor: broadcast(tensor=tensor))
