"""What a rate of training is made of: the samples and tokens of a batch, and the peak of a device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from plugframe.base import map_tensors

#: Dense 16-bit operations per second, by a part of the device's name, as their vendors state; longer names first.
PEAKS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "A10G": 125e12,
    "V100": 125e12,
    "MI300X": 1307e12,
}


def peak_flops(device: torch.device) -> float:
    """Return the 16-bit operations per second of a device at its peak, 0 where that is not known."""
    if device.type != "cuda":
        return 0.0
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), 0.0)


def batch_counts(batch: Any) -> tuple[int, int]:
    """Return the samples and tokens in a batch: the first dimension, and the size of integers in two dimensions."""
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        batch = batch["input_ids"]
    found: list[Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, batch)  # type: ignore[func-returns-value]
    samples = len(found[0]) if found and found[0].ndim else 0
    texts = (each for each in found if each.ndim == 2 and not each.is_floating_point() and each.dtype != torch.bool)
    first = next(texts, None)
    return samples, 0 if first is None else first.numel()
