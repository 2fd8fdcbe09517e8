"""Random numbers within a region: different tokens draw different ones, and all ranks go on with equal ones."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

#: Odd, so that no two ranks of an axis get the same seed.
_STEP = 0x9E3779B1


class Streams:
    """The generators of this rank: those of the CPU and of its device.

    Args:
        device: of this rank.
        index: of this rank in the axis.
    """

    def __init__(self, device: torch.device, index: int) -> None:
        self._device = device
        self._index = index
        module: Any = None if device.type == "cpu" else torch.get_device_module(device)
        self._module = module if hasattr(module, "get_rng_state") else None

    @contextmanager
    def own(self) -> Iterator[None]:
        """Draw numbers of this rank; afterwards all ranks of the axis draw equal ones, and not the same again.

        The numbers depend on the state before alone, so that a block recomputed in backward draws them again.
        """
        before = self._states()
        seed = zlib.crc32(b"".join(bytes(state.numpy()) for state in before)) + self._index * _STEP
        torch.default_generator.manual_seed(seed)
        if self._module is not None:
            self._module.manual_seed(seed)
        begun = self._states()
        try:
            yield
        finally:
            used = [not torch.equal(now, then) for now, then in zip(self._states(), begun, strict=True)]
            self._restore(before)
            self._advance(any(used))

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        """Restore the generators on exit."""
        before = self._states()
        try:
            yield
        finally:
            self._restore(before)

    def _advance(self, used: bool) -> None:
        if used:
            torch.rand(1)
            if self._module is not None:
                torch.rand(1, device=self._device)

    def _states(self) -> list[Tensor]:
        states = [torch.get_rng_state()]
        return states if self._module is None else [*states, self._module.get_rng_state().cpu()]

    def _restore(self, states: list[Tensor]) -> None:
        torch.set_rng_state(states[0])
        if self._module is not None:
            self._module.set_rng_state(states[1])
