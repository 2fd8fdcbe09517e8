"""The accelerator. Importing this module registers the device with torch."""

from __future__ import annotations

from contextlib import ExitStack

import torch
from torch import Tensor

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_pydevice import backend
from plugframe_pydevice.device import libraries as _libraries  # noqa: F401 - importing it registers the device
from plugframe_pydevice.group import BACKEND


class PyDevice(Accelerator):
    """Simulated devices, distinguished by an index."""

    device_type = backend.NAME

    def __init__(self) -> None:
        self._undo = ExitStack()

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return backend.is_available()

    @hookimpl
    def accelerator_device_count(self) -> int:
        return backend.device_count()

    @hookimpl
    def accelerator_setup(self, context: Context) -> None:
        self._undo.enter_context(backend.device(context.device))

    @hookimpl
    def accelerator_teardown(self) -> None:
        self._undo.close()

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return f"cpu:{BACKEND},{backend.NAME}:{BACKEND}"

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        backend.manual_seed_all(seed)

    @hookimpl
    def accelerator_rng_state(self, device: torch.device) -> Tensor:
        return backend.get_rng_state(device)

    @hookimpl
    def accelerator_set_rng_state(self, state: Tensor, device: torch.device) -> None:
        backend.set_rng_state(state, device)

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        return {
            "allocated_bytes": backend.memory_allocated(device),
            "peak_allocated_bytes": backend.max_memory_allocated(device),
        }

    @hookimpl
    def accelerator_synchronize(self, device: torch.device) -> None:
        backend.synchronize(device)
