"""Iterate over the elements of tensors in pieces, without copying a complete tensor."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from plugframe.checkpoint.stored import StoredTensor


def pieces(tensor: Tensor | StoredTensor, *, max_bytes: int) -> Iterator[Tensor]:
    """Yield the elements of `tensor` in row-major order, as contiguous CPU tensors of at most `max_bytes` each.

    One piece at a time is copied, and only if the tensor is on a device or not contiguous.
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
