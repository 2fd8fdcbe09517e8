"""Accelerators that break one rule each: the processor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch

from plugframe.base import map_tensors
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins.cpu.accelerator import CPU


class Right(CPU):
    """Breaks none."""


class Counts(Right):
    """Says how many devices there are where it is asked whether there is one."""

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return self.accelerator_device_count()  # type: ignore[return-value]


class Adds(Right):
    """Reads ``devices="1"`` as two devices."""

    @hookimpl
    def accelerator_parse_devices(self, devices: int | str | Sequence[int]) -> tuple[int, ...]:
        found = super().accelerator_parse_devices(devices)
        return (*found, len(found)) if devices == "1" else found


class Settles(Right):
    """Takes one device where it was asked for nonsense."""

    @hookimpl
    def accelerator_parse_devices(self, devices: int | str | Sequence[int]) -> tuple[int, ...]:
        try:
            return super().accelerator_parse_devices(devices)
        except SettingError:
            return (0,)


class Other(Right):
    """Gives a device of another type than it says."""

    @hookimpl
    def accelerator_device(self, index: int) -> torch.device:
        return torch.device("meta")


class Narrow(Right):
    """Does not compute in float32."""

    @hookimpl
    def accelerator_supports_dtype(self, dtype: torch.dtype, device: torch.device) -> bool:
        return dtype is not torch.float32


class Unheard(Right):
    """Names a type that torch.autocast has not heard of."""

    @hookimpl
    def accelerator_autocast_type(self) -> str:
        return "processor"


class Smoke(Right):
    """Names a backend that nobody has registered."""

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "smoke"


class Copies(Right):
    """Copies what is on the device already."""

    @hookimpl
    def accelerator_move_batch(self, batch: Any, device: torch.device) -> Any:
        return map_tensors(torch.clone, batch)


class Draws(Right):
    """Draws a seed of its own."""

    @hookimpl
    def accelerator_seed(self, seed: int) -> None:
        torch.seed()


class Shrinks(Right):
    """Gives a peak in KiB."""

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        stats = super().accelerator_memory_stats(device)
        return {**stats, "peak_allocated_bytes": stats["peak_allocated_bytes"] >> 10}


class Indexed(Right):
    """Gives the processor an index, which no tensor has."""

    @hookimpl
    def accelerator_device(self, index: int) -> torch.device:
        return torch.device("cpu", 0)


class Leaves(Right):
    """Sets a variable and leaves it."""

    @hookimpl
    def accelerator_setup(self, context: Context) -> None:
        os.environ["WRONG_ACCELERATOR"] = str(int(os.environ.get("WRONG_ACCELERATOR", "0")) + 1)
