"""Bind ranks to the CPUs near their devices, with torch's NUMA binding."""

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
    """Return torch's options to bind ``num_processes`` ranks.

    Raises:
        UsageError: if `binding` is unknown, or this machine does not support it.
    """
    asked = f"--numa-binding={binding}"
    try:
        from torch.numa.binding import AffinityMode, NumaOptions
    except ImportError:
        raise UnsupportedError(
            f"{asked}: torch {torch.__version__} does not support NUMA binding: upgrade torch."
        ) from None
    if "numa_options" not in inspect.signature(WorkerSpec).parameters:
        raise UnsupportedError(f"{asked}: torch {torch.__version__} does not support NUMA binding: upgrade torch.")
    modes = [mode.value for mode in AffinityMode]
    if binding not in modes:
        raise SettingError(f"{asked}: use one of {', '.join(modes)}.")
    if not os.path.isdir(_NODES):
        raise UnsupportedError(f"{asked}: {_NODES} does not exist, so there are no NUMA nodes to bind to: omit it.")
    count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    if count < num_processes:
        raise UnsupportedError(
            f"{asked}: torch binds each of the {num_processes} ranks near the GPU of its local rank, and this "
            f"machine has {count}: omit the option."
        )
    if shutil.which("numactl") is None:
        raise UnsupportedError(f"{asked} requires numactl: install it (apt install numactl), or omit the option.")
    return NumaOptions(affinity_mode=AffinityMode(binding))


def binding_error(binding: str, error: Exception) -> UnsupportedError:
    """Return the error for a binding that torch failed to apply."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())
    return UnsupportedError(f"--numa-binding={binding}: torch could not bind the ranks ({reason}): omit the option.")
