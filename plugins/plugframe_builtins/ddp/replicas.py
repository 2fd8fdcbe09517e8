"""Giving every rank the tensors of rank 0, whatever their dtype and strides."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

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
    stored = [_stored(tensor.detach()) for tensor in tensors]
    sent = torch.cat([_bytes(tensor) for tensor in stored])
    dist.broadcast(sent, dist.get_global_rank(group, 0), group=group)
    if dist.get_rank(group) == 0:
        return
    for tensor, piece in zip(stored, sent.split([_nbytes(tensor) for tensor in stored]), strict=True):
        value = piece.clone().view(tensor.dtype).view(tensor.shape)  # cloned: a view needs its dtype's alignment
        if tensor.is_inference():  # made by a forward under inference_mode, and writable only there
            with torch.inference_mode():
                tensor.copy_(value)
        else:
            tensor.copy_(value)


def _stored(tensor: Tensor) -> Tensor:
    """Return a view that has each stored element once: an expanded tensor cannot be written as it is."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)


def _nbytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
