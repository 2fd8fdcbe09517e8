"""Register the devices with torch on import: ``torch.device("pydevice", 2)``, ``torch.pydevice``."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import backend_registration

from plugframe_pydevice import autocast, backend, group, kernels


def load() -> None:
    """Do nothing: a target for an entry point of ``torch.backends``, which torch loads when it is imported."""


class _DeviceIndex:
    def __init__(self, device: int | None, /) -> None:
        self.index = device
        self.previous = backend.current_device()

    def __enter__(self) -> None:
        if self.index is not None:
            self.previous = backend.current_device()
            backend.set_device(self.index)

    def __exit__(self, *error: object) -> None:
        if self.index is not None:
            backend.set_device(self.previous)


def _capability(device: Any = None, /) -> dict[str, Any]:
    dtypes = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    return {"supported_dtypes": dtypes}


_torch_resize: Any = torch.UntypedStorage.resize_


def _resize(storage: torch.UntypedStorage, size_bytes: int) -> Any:
    """Ignore a shrinking resize (as of fully sharded parameters): Python cannot move the storage."""
    if storage.device.type != backend.NAME:
        return _torch_resize(storage, size_bytes)
    if size_bytes > storage.nbytes():
        raise RuntimeError(f"The memory of a tensor on {backend.NAME} cannot grow: make a new tensor.")
    return storage


# The only way to register a device without C++; experimental in torch, without a public name yet.
backend_registration._setup_privateuseone_for_python_backend(backend.NAME, backend)
# Kernels stay registered while these are referenced.
libraries = [*kernels.register(), *autocast.register()]
group.register()
# torch's backward thread for such a device serves index 0 only, so run backwards in the calling thread.
torch.autograd.set_multithreading_enabled(False)

# torch.accelerator gets memory statistics and the current device from the C++ allocator and guard of a device. A device
# in Python has neither: these functions would raise, or always return index 0.
_overrides: dict[str, Any] = {
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
for _name, _override in _overrides.items():
    setattr(torch.accelerator, _name, _override)
_storage: Any = torch.UntypedStorage
_storage.resize_ = _resize
