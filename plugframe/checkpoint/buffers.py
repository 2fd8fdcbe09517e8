"""The bytes of tensors, without copying a tensor whole."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor

from plugframe.checkpoint.stored import StoredTensor


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes; valid while the tensor lives.

    Raises:
        ValueError: if it is elsewhere, or not in one piece.
    """
    if tensor.numel() == 0:
        return memoryview(bytearray())
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.data_ptr() == 0:
        raise ValueError(f"a tensor on {tensor.device} with strides {tensor.stride()} has no plain bytes")
    # Not through numpy: it is optional and does not know bfloat16 and the 8-bit floats.
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")


def pieces(tensor: Tensor | StoredTensor, *, max_bytes: int) -> Iterator[Tensor]:
    """Yield the elements of `tensor` in row-major order: contiguous CPU tensors of at most `max_bytes` each.

    Only a piece at a time is copied, and only if the tensor is on a device or not contiguous.
    """
    if isinstance(tensor, StoredTensor):
        tensor = tensor.read()
    if tensor.nbytes <= max_bytes:
        yield tensor.cpu().contiguous()
    elif tensor.is_contiguous():
        for part in torch.split(tensor.view(-1), max_bytes // tensor.element_size()):
            yield part.cpu()
    elif tensor.shape[0] == 1:
        yield from pieces(tensor[0], max_bytes=max_bytes)
    else:
        row_bytes = tensor.nbytes // tensor.shape[0]
        for part in torch.split(tensor, max(1, max_bytes // row_bytes)):
            yield from pieces(part, max_bytes=max_bytes)
