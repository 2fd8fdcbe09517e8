"""Sending the tensors of one rank to all, whatever their dtypes and strides."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from plugframe.utils.expanded import overwrite, stored

#: Bytes that travel at once: what is sent is copied before.
_CHUNK_BYTES = 1 << 28


@torch.no_grad()
def broadcast_tensors(
    tensors: Iterable[Tensor], broadcast: Callable[[Tensor], Tensor], *, is_source: bool = False
) -> None:
    """Overwrite `tensors` with those of the source rank, a few broadcasts for all of them. All ranks must call it.

    Args:
        tensors: equal in number, shapes, dtypes and devices on all ranks; may be expanded or 0-d. Those that are not
            dense are left out.
        broadcast: takes bytes of shape (n,), on the tensors' device, and returns those of the source rank.
        is_source: whether this rank is the source, whose tensors stay untouched.
    """
    by_device: dict[torch.device, list[Tensor]] = {}
    for tensor in tensors:
        if tensor.numel() and tensor.layout is torch.strided:
            by_device.setdefault(tensor.device, []).append(stored(tensor.detach()))
    for each in by_device.values():
        for chunk in _chunks(each):
            # As bytes: a broadcast computes nothing, so that all dtypes travel together, over every backend.
            sent = broadcast(torch.cat([_bytes(tensor) for tensor in chunk]))
            if is_source:
                continue
            for tensor, piece in zip(chunk, torch.split(sent, [tensor.nbytes for tensor in chunk]), strict=True):
                # Cloned: a view needs its dtype's alignment.
                overwrite(tensor, piece.clone().view(tensor.dtype).view(tensor.shape))


def _chunks(tensors: list[Tensor]) -> Iterable[list[Tensor]]:
    chunk: list[Tensor] = []
    size_bytes = 0
    for tensor in tensors:
        chunk.append(tensor)
        size_bytes += tensor.nbytes
        if size_bytes >= _CHUNK_BYTES:
            yield chunk
            chunk, size_bytes = [], 0
    if chunk:
        yield chunk


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.resolve_conj().resolve_neg().contiguous().view(-1).view(torch.uint8)
