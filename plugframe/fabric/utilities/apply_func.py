"""Move data to a device."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
from torch import Tensor

from plugframe.utils.tree import map_tensors

T = TypeVar("T")


def move_data_to_device(batch: T, device: torch.device | str | int) -> T:
    """Return `batch` with every tensor on `device`; ``lite.to_device(batch)`` takes this rank's.

    Args:
        batch: a tensor, or a nesting of mappings, sequences and dataclasses with tensors.
        device: a device, its name, or an accelerator's index.
    """

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, non_blocking=tensor.device.type == "cpu" and tensor.is_pinned())

    return cast("T", map_tensors(move, batch))
