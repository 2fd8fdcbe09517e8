"""Move data to a device."""

from __future__ import annotations

from typing import TypeVar, cast

import torch

from plugframe.utils.movable import move_data

T = TypeVar("T")


def move_data_to_device(batch: T, device: torch.device | str | int) -> T:
    """Return `batch` with every tensor on `device`; ``lite.to_device(batch)`` takes this rank's.

    Args:
        batch: a tensor, or a nesting of mappings, sequences and dataclasses with tensors,
            and objects with a ``to`` of their own.
        device: a device, its name, or an accelerator's index.
    """
    return cast("T", move_data(batch, device))
