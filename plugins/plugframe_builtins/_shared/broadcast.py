"""Giving every rank the tensors of rank 0, whatever their dtype and strides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import overwrite, stored

#: Bytes that travel at once: what is sent is copied before.
_CHUNK_BYTES = 1 << 28


@torch.no_grad()
def send_from_first(tensors: Iterable[Tensor], group: Any) -> None:
    """Overwrite `tensors`, on every rank but the first of `group`, with those of the first. All ranks must call it.

    Args:
        tensors: dense ones, equal in number, shapes and dtypes on all ranks; may be expanded or 0-d.
    """
    if dist.get_world_size(group) == 1:
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.layout is torch.strided:
            by_device.setdefault(tensor.device, []).append(tensor)
    for each in by_device.values():
        chunk: list[Tensor] = []
        for tensor in each:
            chunk.append(tensor)
            if sum(map(_nbytes, chunk)) >= _CHUNK_BYTES:
                _send(chunk, group)
                chunk = []
        if chunk:
            _send(chunk, group)


def _send(tensors: list[Tensor], group: Any) -> None:
    # As bytes: a broadcast computes nothing, so that all dtypes travel together, over every backend.
    own = [stored(tensor.detach()) for tensor in tensors]
    sent = torch.cat([_bytes(tensor) for tensor in own])
    dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
    if dist.get_rank(group) == 0:
        return
    for tensor, piece in zip(own, torch.split(sent, [_nbytes(tensor) for tensor in own]), strict=True):
        value = piece.clone().view(tensor.dtype).view(tensor.shape)  # cloned: a view needs its dtype's alignment
        overwrite(tensor, value)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
