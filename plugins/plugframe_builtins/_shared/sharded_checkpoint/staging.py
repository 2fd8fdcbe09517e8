"""Stage tensors for background saves in reusable CPU buffers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.staging import AsyncStager


class Staging:
    """CPU buffers for a rank's pieces."""

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    @torch.no_grad()
    def copy(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return copies of `values`, valid until the next call."""
        self._buffers = {name: self._buffer(name, value) for name, value in values.items()}
        # One thread saturates the memory bandwidth.
        for name, value in values.items():
            self._buffers[name].copy_(value, non_blocking=not value.is_cpu)
        for device in {value.device for value in values.values() if not value.is_cpu}:
            torch.accelerator.synchronize(device)
        return dict(self._buffers)

    def _buffer(self, name: str, value: Tensor) -> Tensor:
        there = self._buffers.get(name)
        if there is not None and there.dtype is value.dtype and there.shape == value.shape:
            return there
        accelerator = None if value.is_cpu else torch.accelerator.current_accelerator()
        pinned = accelerator is not None and accelerator.type == value.device.type
        return torch.empty(value.shape, dtype=value.dtype, device="cpu", pin_memory=pinned)

    def clear(self) -> None:
        """Free the buffers."""
        self._buffers = {}


class Staged(AsyncStager):
    """A stager for a state that is a copy already."""

    @property
    def should_synchronize_after_execute(self) -> bool:
        """Return False: there is nothing to wait for."""
        return False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Return the state unchanged."""
        return state_dict

    def synchronize_staging(self) -> None:
        """Do nothing: there is nothing to wait for."""

    def close(self) -> None:
        """Do nothing: there is nothing to clean up."""
