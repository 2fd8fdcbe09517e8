"""Ranks bound to the CPUs near their devices, by torch's own means."""

from __future__ import annotations

import inspect
import os
import shutil
from typing import Any

import torch
from torch.distributed.elastic.agent.server.api import WorkerSpec

from plugframe.errors import SettingError, UnsupportedError

_NODES = "/sys/devices/system/node"


def numa_options(binding: str, num_processes: int) -> Any:
    """Return torch's options for a binding of ``num_processes`` ranks.

    Raises:
        UsageError: if there is no such binding, or it cannot be done on this machine.
    """
    asked = f"--numa-binding={binding}"
    try:
        from torch.numa.binding import AffinityMode, NumaOptions
    except ImportError:
        raise UnsupportedError(f"{asked}: torch {torch.__version__} cannot bind ranks: take a newer one.") from None
    if "numa_options" not in inspect.signature(WorkerSpec).parameters:
        raise UnsupportedError(f"{asked}: torch {torch.__version__} cannot bind ranks: take a newer one.")
    modes = [mode.value for mode in AffinityMode]
    if binding not in modes:
        raise SettingError(f"{asked}: type one of {', '.join(modes)}.")
    if not os.path.isdir(_NODES):
        raise UnsupportedError(f"{asked}: this machine tells nothing of its NUMA nodes (no {_NODES}): leave it out.")
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < num_processes:
        raise UnsupportedError(
            f"{asked}: torch binds each of the {num_processes} ranks near the GPU of its local number, and this "
            f"machine has {count}: leave it out."
        )
    if shutil.which("numactl") is None:
        raise UnsupportedError(f"{asked} needs the program numactl: install it (apt install numactl), or leave it out.")
    return NumaOptions(affinity_mode=AffinityMode(binding))


def refused(binding: str, error: Exception) -> UnsupportedError:
    """Return the error for a binding that torch could not do."""
    said = " ".join(f"{type(error).__name__}: {error}".split())
    return UnsupportedError(f"--numa-binding={binding}: torch could not bind the ranks ({said}): leave it out.")
