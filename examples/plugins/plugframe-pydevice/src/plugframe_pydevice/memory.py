"""Memory of the simulated devices: host memory, passed to torch as device memory."""

from __future__ import annotations

import ctypes
import threading
from collections import defaultdict

import torch
from torch import Tensor

_EXTENSION_DEVICE = 12  # kDLExtDev: torch maps it to the out-of-tree device type
_UNSIGNED, _BITS, _LANES = 1, 8, 1
_HEADER_BYTES = 256


class _Array(ctypes.Structure):
    """``DLTensor`` of the DLPack protocol."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("byte_offset", ctypes.c_uint64),
    )


class _Block(ctypes.Structure):
    """``DLManagedTensor`` of the DLPack protocol, followed by the targets of its pointers."""

    _fields_ = (
        ("array", _Array),
        ("manager", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("shape", ctypes.c_int64),
        ("stride", ctypes.c_int64),
    )


_libc = ctypes.CDLL(None)
_libc.malloc.restype = ctypes.c_void_p
_libc.malloc.argtypes = [ctypes.c_size_t]
_libc.free.argtypes = [ctypes.c_void_p]
_libc.sem_init.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint]
_libc.sem_getvalue.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
_release_address = ctypes.cast(_libc.sem_post, ctypes.c_void_p).value
_new_capsule = ctypes.pythonapi.PyCapsule_New
_new_capsule.restype = ctypes.py_object
_new_capsule.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]


class Memory:
    """Allocate and count blocks, as the allocator of a driver would.

    When torch releases a block, a semaphore in its header marks it, and the next `collect` frees it. A Python deleter
    cannot free it immediately: torch also releases tensors while an exception propagates, which would be lost.
    """

    def __init__(self) -> None:
        self._in_use_bytes: dict[int, int] = defaultdict(int)
        self._peak_bytes: dict[int, int] = defaultdict(int)
        self._blocks: dict[int, tuple[int, int]] = {}
        self._lock = threading.RLock()

    def allocated_bytes(self, index: int) -> int:
        """Return the bytes in use on a device."""
        self.collect()
        return self._in_use_bytes[index]

    def peak_bytes(self, index: int) -> int:
        """Return the peak of the bytes in use on a device."""
        return self._peak_bytes[index]

    def reset_peak(self, index: int) -> None:
        """Reset the peak to the bytes now in use."""
        self._peak_bytes[index] = self.allocated_bytes(index)

    def allocate(self, size_bytes: int, *, index: int) -> Tensor:
        """Allocate bytes on the device `index`; return a flat uint8 tensor that owns them."""
        with self._lock:
            if self._in_use_bytes[index] + size_bytes > self._peak_bytes[index]:
                self.collect()  # released blocks must not count towards the peak
            address = _libc.malloc(_HEADER_BYTES + size_bytes)
            if not address:
                raise torch.OutOfMemoryError(f"pydevice:{index} cannot allocate {size_bytes} bytes.")
            self._blocks[address] = index, size_bytes
            self._in_use_bytes[index] += size_bytes
            self._peak_bytes[index] = max(self._peak_bytes[index], self._in_use_bytes[index])
            block = _Block.from_address(address)
            block.shape, block.stride = size_bytes, 1
            shape, stride = address + _Block.shape.offset, address + _Block.stride.offset
            data = address + _HEADER_BYTES
            block.array = _Array(data, _EXTENSION_DEVICE, index, 1, _UNSIGNED, _BITS, _LANES, shape, stride, 0)
            block.manager = None
            block.deleter = _release_address
            tensor: Tensor = torch.utils.dlpack.from_dlpack(_new_capsule(address, b"dltensor", None))
            # torch has read the array, and the deleter gets its address: the semaphore can overwrite it now.
            _libc.sem_init(address, 0, 0)
            return tensor

    def collect(self) -> None:
        """Free the blocks that torch has released."""
        marked = ctypes.c_int()
        with self._lock:
            for address, (index, size_bytes) in tuple(self._blocks.items()):
                _libc.sem_getvalue(address, ctypes.byref(marked))
                if marked.value:
                    del self._blocks[address]
                    self._in_use_bytes[index] -= size_bytes
                    _libc.free(address)
