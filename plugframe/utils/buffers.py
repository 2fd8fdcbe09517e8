"""Synchronise buffers that change in forward (running statistics) across ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from plugframe.utils.shards import is_shard


@torch.no_grad()
def sync_buffers(module: nn.Module, hooks: Any) -> None:
    """Broadcast rank 0's persistent buffers, with one broadcast per dtype. Every rank must call it.

    Non-persistent buffers are skipped, because they are computed (masks, position tables).
    """
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for buffer in persistent_buffers(module):
        by_dtype.setdefault(buffer.dtype, []).append(buffer)
    for buffers in by_dtype.values():
        flat = torch.cat([buffer.reshape(-1) for buffer in buffers])
        sent = hooks.collective_broadcast(tensor=flat, src=0, group=None)
        for buffer, piece in zip(buffers, torch.split(sent, [buffer.numel() for buffer in buffers]), strict=True):
            overwrite(buffer, piece.view(buffer.shape))


def persistent_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers in the module's state dict, each once, without sharded and empty ones."""
    names = set(module.state_dict(keep_vars=True))
    named = module.named_buffers()
    return [buffer for name, buffer in named if name in names and not is_shard(buffer) and buffer.numel()]


def stored(tensor: Tensor) -> Tensor:
    """Return a view with each stored element once: an expanded tensor cannot be written directly."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if size > 1 and stride == 0:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor


@torch.no_grad()
def overwrite(tensor: Tensor, value: Tensor) -> None:
    """Copy `value` into `tensor`, of the same shape, which may be expanded or created under ``inference_mode``."""
    target = stored(tensor)
    for dim, size in enumerate(target.shape):
        value = value.narrow(dim, 0, size)
    if target.is_inference():  # writable only in inference mode
        with torch.inference_mode():
            target.copy_(value)
    else:
        target.copy_(value)


def load_expanded(module: torch.nn.Module, state: dict[str, Any]) -> list[str]:
    """Load expanded buffers, which ``load_state_dict`` cannot write; return their names."""
    found = []
    for name, buffer in module.named_buffers():
        value = state.get(name)
        if isinstance(value, Tensor) and stored(buffer) is not buffer and value.shape == buffer.shape:
            overwrite(buffer, value)
            found.append(name)
    return found
