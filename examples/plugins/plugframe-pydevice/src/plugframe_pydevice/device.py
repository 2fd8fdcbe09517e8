"""Importing this module makes the devices known to torch: ``torch.device("pydevice", 2)``, ``torch.pydevice``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration

from plugframe_pydevice import autocast, backend, group, kernels


def load() -> None:
    """Do nothing more: what torch calls when it is imported, where an entry point of ``torch.backends`` names it."""


class _DeviceIndex:
    def __init__(self, device: int | None, /) -> None:
        self.index = device
        self.before = backend.current_device()

    def __enter__(self) -> None:
        if self.index is not None:
            self.before = backend.current_device()
            backend.set_device(self.index)

    def __exit__(self, *error: object) -> None:
        if self.index is not None:
            backend.set_device(self.before)


def _capability(device: Any = None, /) -> dict[str, Any]:
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {"supported_dtypes": dtypes}


_resize_of_torch: Any = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size_bytes: int) -> Any:
    """Keep memory that is given back for a while (as fully sharded parameters are): no Python can move it."""
    if storage.device.type != backend.NAME:
        return _resize_of_torch(storage, size_bytes)
    if size_bytes > storage.nbytes():
        raise RuntimeError(f"The memory of a tensor on {backend.NAME} cannot grow: make a new tensor.")
    return storage


# The one way to a device without C++; torch calls it experimental, and has no public name for it yet.
backend_registration._setup_privateuseone_for_python_backend(backend.NAME, backend)
# The kernels are there for as long as these are.
libraries = [*kernels.register(), *autocast.register()]
group.register()
# torch gives such a device one thread for backwards, which serves index 0 alone: they run where they are called.
torch.autograd.set_multithreading_enabled(False)

# A device in C++ has an allocator and a guard, which know the memory in use and the current device. torch gives one in
# Python neither: these would raise, or call index 0 the current device for ever.
_answers: dict[str, Any] = {
    "current_device_index": backend.current_device,
    "set_device_index": backend.set_device,
    "device_index": _DeviceIndex,
    "get_device_capability": _capability,
    "synchronize": backend.synchronize,
    "empty_cache": backend.empty_cache,
    "memory_allocated": backend.memory_allocated,
    "memory_reserved": backend.memory_allocated,
    "max_memory_allocated": backend.max_memory_allocated,
    "max_memory_reserved": backend.max_memory_allocated,
    "reset_peak_memory_stats": backend.reset_peak_memory_stats,
}
for _name, _answer in _answers.items():
    setattr(torch.accelerator, _name, _answer)
_storage: Any = torch.UntypedStorage
_storage.resize_ = _resize
