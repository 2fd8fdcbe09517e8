"""Apple's Metal device as an accelerator."""

from __future__ import annotations

import torch
from torch import Tensor

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl


class MPS(Accelerator):
    """The only GPU of a Mac."""

    device_type = "mps"

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return torch.backends.mps.is_available()

    @hookimpl
    def accelerator_teardown(self) -> None:
        if torch.backends.mps.is_available():  # tear-down also runs after a failed set-up
            torch.mps.empty_cache()

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "gloo"

    @hookimpl
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        if dtype is torch.bfloat16:
            return torch.backends.mps.is_macos_or_newer(14, 0)
        return dtype not in (torch.float64, torch.complex128)

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        torch.mps.manual_seed(seed)

    @hookimpl
    def accelerator_rng_state(self, device: torch.device) -> Tensor | None:
        return torch.mps.get_rng_state()

    @hookimpl
    def accelerator_set_rng_state(self, state: Tensor, device: torch.device) -> None:
        torch.mps.set_rng_state(state.to("cpu", torch.uint8))

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        """Return Metal's figures. It records no peak; the driver's memory, which seldom shrinks, is used instead."""
        return {
            "allocated_bytes": torch.mps.current_allocated_memory(),
            "peak_allocated_bytes": torch.mps.driver_allocated_memory(),
        }

    @hookimpl
    def accelerator_synchronize(self, device: torch.device) -> None:
        torch.mps.synchronize()
