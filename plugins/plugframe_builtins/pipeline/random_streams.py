"""Random numbers of stages: every stage draws its own, and the ranks stay in step outside of the model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plugframe_builtins.pipeline.axis import Axis


class Stream:
    """The generators of this rank while a stage runs."""

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._before = self._states()

    def drew(self) -> bool:
        """Return whether random numbers were drawn."""
        return any(not torch.equal(a, b) for a, b in zip(self._before, self._states(), strict=True))

    def _states(self) -> list[Tensor]:
        device: Any = self._axis.hooks.accelerator_rng_state(device=self._axis.device)
        return [torch.get_rng_state(), *([] if device is None else [device])]


def shared_seed() -> int:
    """Return a seed from torch's generator, which is equal on all ranks of the pipeline and advances equally."""
    return int(torch.randint(2**62, ()))


@contextmanager
def stage_random(axis: Axis, seed: int) -> Iterator[Stream]:
    """Give this rank's stages random numbers of their own, and restore the generators at the end."""
    device = axis.device
    devices = [] if device.type == "cpu" else [device]
    with torch.random.fork_rng(devices=devices, device_type=device.type if devices else "cuda"):
        torch.manual_seed(seed + axis.rank)
        yield Stream(axis)
