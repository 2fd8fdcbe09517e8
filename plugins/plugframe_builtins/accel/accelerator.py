"""An accelerator for any device that ``torch.accelerator`` supports."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context


class TorchAccelerator(Accelerator):
    """The devices of this machine's accelerator type in torch.

    Attributes:
        device_type: that type; ``"none"`` without an accelerator, which makes this plugin unavailable.
    """

    def __init__(self) -> None:
        found = torch.accelerator.current_accelerator()
        self.device_type = found.type if found else "none"
        self._undo = ExitStack()

    @hookimpl
    def accelerator_is_available(self) -> bool:
        # torch.accelerator.is_available() initialises some runtimes, and then ranks cannot be forked.
        return self.accelerator_device_count() > 0

    @hookimpl
    def accelerator_device_count(self) -> int:
        return torch.accelerator.device_count()

    @hookimpl
    def accelerator_setup(self, context: Context) -> None:
        self._undo.enter_context(torch.accelerator.device_index(context.device.index))
        self._undo.callback(torch.accelerator.empty_cache)

    @hookimpl
    def accelerator_teardown(self) -> None:
        self._undo.close()

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        backend = None
        if torch.distributed.is_available():
            backend = torch.distributed.Backend.default_device_backend_map.get(self.device_type)
        # A device type without a backend communicates through the CPU's.
        return f"cpu:gloo,{self.device_type}:{backend}" if backend not in (None, "gloo") else "gloo"

    @hookimpl
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        capability = getattr(torch.accelerator, "get_device_capability", None)
        return capability is None or dtype in capability(device)["supported_dtypes"]

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        self._call("manual_seed_all", seed)

    @hookimpl
    def accelerator_rng_state(self, device: torch.device) -> Tensor | None:
        state: Tensor | None = self._call("get_rng_state", device)
        return state

    @hookimpl
    def accelerator_set_rng_state(self, state: Tensor, device: torch.device) -> None:
        self._call("set_rng_state", state.to("cpu", torch.uint8), device)

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        return {
            "allocated_bytes": torch.accelerator.memory_allocated(device),
            "peak_allocated_bytes": torch.accelerator.max_memory_allocated(device),
            "reserved_bytes": torch.accelerator.memory_reserved(device),
            "peak_reserved_bytes": torch.accelerator.max_memory_reserved(device),
        }

    @hookimpl
    def accelerator_synchronize(self, device: torch.device) -> None:
        torch.accelerator.synchronize(device)

    def _call(self, name: str, *args: Any) -> Any:
        """Call a function of the device's module (``torch.xpu``, …), which a small backend may lack."""
        function: Callable[..., Any] | None = getattr(torch.get_device_module(self.device_type), name, None)
        return function(*args) if function else None
