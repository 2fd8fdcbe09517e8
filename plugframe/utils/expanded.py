"""Tensors whose elements share memory (``expand``), written all the same."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def stored(tensor: Tensor) -> Tensor:
    """Return a view that has each stored element once: an expanded tensor cannot be written as it is."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Copy `value`, of the same shape, into `tensor`, which may be expanded, or made under ``inference_mode``."""
    target = stored(tensor)
    for dim, size in enumerate(target.shape):
        value = value.narrow(dim, 0, size)
    if target.is_inference():  # writable only there
        with torch.inference_mode():
            target.copy_(value)
    else:
        target.copy_(value)


def load_expanded(module: torch.nn.Module, state: dict[str, Any]) -> list[str]:
    """Load those buffers that are expanded, which ``load_state_dict`` cannot write; return their names."""
    found = []
    for name, buffer in module.named_buffers():
        value = state.get(name)
        if isinstance(value, Tensor) and stored(buffer) is not buffer and value.shape == buffer.shape:
            overwrite(buffer, value)
            found.append(name)
    return found
