"""The base class of accelerators: defaults for most devices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.hooks import AcceleratorSpec, hookimpl
from plugframe.hooks.context import Context
from plugframe.utils.devices import parse_devices
from plugframe.utils.movable import move_data


class Accelerator(AcceleratorSpec):
    """Base class of accelerators: set `device_type`, override hooks and mark them with ``@hookimpl``.

    Attributes:
        device_type: the ``torch.device(…).type`` of these devices.
        indexed: whether devices have an index; if not, any number of ranks share one.
    """

    device_type: str
    indexed: bool = True

    @hookimpl
    def accelerator_device_count(self) -> int:
        return 1

    @hookimpl
    def accelerator_parse_devices(self, devices: int | str | Sequence[int]) -> tuple[int, ...]:
        count = self.accelerator_device_count()
        return parse_devices(devices, count=count, name=self.device_type, indexed=self.indexed)

    @hookimpl
    def accelerator_device(self, index: int) -> torch.device:
        return torch.device(self.device_type, index) if self.indexed else torch.device(self.device_type)

    @hookimpl
    def accelerator_setup(self, context: Context) -> None:
        pass

    @hookimpl
    def accelerator_teardown(self) -> None:
        pass

    @hookimpl
    def accelerator_autocast_type(self) -> str:
        return self.device_type

    @hookimpl
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        return True

    @hookimpl
    def accelerator_move_batch(self, batch: Any, device: torch.device) -> Any:
        return move_data(batch, device)

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        pass  # torch.manual_seed, called before, seeds all devices that torch supports

    @hookimpl
    def accelerator_rng_state(self, device: torch.device) -> Tensor | None:
        return None

    @hookimpl
    def accelerator_set_rng_state(self, state: Tensor, device: torch.device) -> None:
        pass

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        return {"allocated_bytes": 0, "peak_allocated_bytes": 0}

    @hookimpl
    def accelerator_synchronize(self, device: torch.device) -> None:
        pass
