"""The CPU as an accelerator, without ``torch.accelerator``, which raises on machines without one."""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path
from typing import Any

import torch

from plugframe.base import Accelerator
from plugframe.hooks import hookimpl


class CPU(Accelerator):
    """One device without an index, shared by any number of ranks; ``devices="auto"`` is one process."""

    device_type = "cpu"
    indexed = False

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return True

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "gloo"

    @hookimpl
    def accelerator_move_batch(self, batch: Any, device: torch.device) -> Any:
        return batch

    @hookimpl
    def accelerator_memory_stats(self, device: torch.device) -> dict[str, int]:
        """Return this process's resident memory; the peak stands for both where only that is available."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        resident = _resident_bytes()
        if resident is None:
            return {"allocated_bytes": peak, "peak_allocated_bytes": peak}
        # The kernel updates the peak only now and then.
        return {"allocated_bytes": resident, "peak_allocated_bytes": max(peak, resident)}


def _resident_bytes() -> int | None:
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except FileNotFoundError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")
