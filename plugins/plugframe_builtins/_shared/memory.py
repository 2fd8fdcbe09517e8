"""Measure the memory of one rank by kind, and its peak."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from plugframe.base import size_text

try:
    import resource
except ImportError:  # not on Windows
    resource = None  # type: ignore[assignment]


class Memory:
    """Bytes of this rank's parameters, gradients and optimizer state, and the peak memory."""

    def __init__(self) -> None:
        self._device = torch.device("cpu")
        self._modules: list[nn.Module] = []
        self._optimizers: list[Optimizer] = []
        self._most: dict[str, int] = {}
        self._at_start = 0

    def begin(self, device: torch.device) -> None:
        """Start measuring."""
        self._device = device
        if device.type != "cpu":
            torch.accelerator.reset_peak_memory_stats(device)
        self._at_start = self._peak()

    def watch(self, module: nn.Module, optimizers: Sequence[Optimizer]) -> None:
        """Count the tensors of a module and its optimizers."""
        self._modules.append(module)
        self._optimizers += optimizers

    def look(self) -> None:
        """Update the maximum of each kind, at the end of a step."""
        parameters = [p for module in self._modules for p in module.parameters()]
        state = (value for o in self._optimizers for entry in o.state.values() for value in entry.values())
        held = {
            "parameters": parameters,
            "gradients": (p.grad for p in parameters),
            "optimizer state": state,
            "buffers": (buffer for module in self._modules for buffer in module.buffers()),
        }
        for what, values in held.items():
            self._most[what] = max(self._most.get(what, 0), _bytes(values))

    def lines(self) -> list[str]:
        """Return the lines of the report."""
        held = ", ".join(f"{what} {size_text(size)}" for what, size in self._most.items() if size)
        peak = self._peak()
        where = f"of {self._device}" if self._device.type != "cpu" else "of the process"
        rose = f"peak {where} {size_text(peak)}, {size_text(self._at_start)} when the job began"
        return [*([f"memory of this rank: {held}"] if held else []), rose]

    def _peak(self) -> int:
        if self._device.type != "cpu":
            return int(torch.accelerator.max_memory_allocated(self._device))
        if resource is None:
            return 0
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024


def _bytes(values: Iterable[Any]) -> int:
    """Return the bytes of the local tensors among these, each counted once."""
    sizes = {}
    for value in values:
        if isinstance(value, Tensor):
            local = value.to_local() if isinstance(value, DTensor) else value
            sizes[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(sizes.values())
