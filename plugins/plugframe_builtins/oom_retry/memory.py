"""Recognise out-of-memory errors, and free memory."""

from __future__ import annotations

import gc

import torch

#: Messages of errors without a class of their own: torch's CPU allocator, Metal, cuBLAS and cuDNN.
_PHRASES = ("out of memory", "can't allocate memory", "not enough memory", "_STATUS_ALLOC_FAILED")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether `error` means out of memory, on the device or the host."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(phrase in str(error) for phrase in _PHRASES)


def free_memory(device: torch.device) -> None:
    """Collect reference cycles, and release the allocator's cached memory."""
    gc.collect()
    empty = getattr(torch.get_device_module(device), "empty_cache", None)
    if empty is not None:
        empty()
