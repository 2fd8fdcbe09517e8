"""Flat tensors of many parameters or gradients: weight updates from the script, and bucket order."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

#: Number of elements compared at once.
_AT_ONCE = 1 << 24


@torch.no_grad()
def follow(values: Tensor, weights: Tensor) -> None:
    """Copy changed elements of `values` into `weights`, this rank's flat float32 weights.

    After a step every value equals the weight rounded to its dtype. A difference is a change by the script, which
    need not increase a version counter (``parameter.data.clamp_()``).
    """
    target = weights.detach()
    if values.dtype is target.dtype:
        target.copy_(values)
        return
    for new, old in zip(torch.split(values.detach(), _AT_ONCE), torch.split(target, _AT_ONCE), strict=True):
        new = new.to(old.device)
        old.copy_(torch.where(new == old.to(new.dtype), old, new.to(old.dtype)))


def sort_bucket(bucket: Any, *, contiguous: bool) -> None:
    """Sort a bucket of gradients by parameter, so that all ranks have the same order.

    The last parameter comes first, as in most backwards: then nothing moves.
    """
    order = sorted(range(len(bucket.params)), key=lambda place: -bucket.params[place][2])
    if order == list(range(len(order))):
        return
    if contiguous and bucket.elements:
        flat = torch.cat([bucket.grads[place].reshape(-1) for place in order])
        own = bucket.buffer[bucket.index].narrow(0, 0, bucket.elements)
        own.copy_(flat)
        start = 0
        for place in order:
            gradient = bucket.grads[place]
            gradient.data = own.narrow(0, start, gradient.numel()).view(gradient.shape)
            start += gradient.numel()
    bucket.params[:] = [bucket.params[place] for place in order]
    bucket.grads[:] = [bucket.grads[place] for place in order]
