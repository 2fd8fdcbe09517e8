"""Memory that ran out: how to tell, and how to get it back."""

from __future__ import annotations

import gc

import torch

#: What torch says, besides raising its own class: its CPU allocator, Metal, cuBLAS and cuDNN have only words.
_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory ran out, the device's or the host's."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def free_memory(device: torch.device) -> None:
    """Free what only reference cycles keep, and give the device what its allocator holds back."""
    gc.collect()
    empty = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty is not None:
        empty()
