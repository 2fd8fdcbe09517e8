"""Access the raw bytes of a tensor."""

from __future__ import annotations

import ctypes

from torch import Tensor


def as_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous CPU tensor as writable bytes; valid while the tensor lives.

    Raises:
        ValueError: if it is not on the CPU, or not contiguous.
    """
    if tensor.numel() == 0:
        return memoryview(bytearray())
    if not tensor.is_cpu or not tensor.is_contiguous() or tensor.data_ptr() == 0:
        raise ValueError(f"a tensor on {tensor.device} with strides {tensor.stride()} has no plain bytes")
    # Not through numpy, which is optional and does not support bfloat16 and 8-bit floats.
    return memoryview((ctypes.c_ubyte * tensor.nbytes).from_address(tensor.data_ptr())).cast("B")
