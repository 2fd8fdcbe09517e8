"""The states of the generators of a rank: those of torch for the CPU and its device, and Python's."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def states(device: torch.device) -> tuple[Any, ...]:
    """Return the states, to compare and to restore."""
    module = _module(device)
    return random.getstate(), torch.get_rng_state(), None if module is None else module.get_rng_state()


def restore(device: torch.device, kept: tuple[Any, ...]) -> None:
    """Set the generators to these states."""
    random.setstate(kept[0])
    torch.set_rng_state(kept[1])
    module = _module(device)
    if module is not None:
        module.set_rng_state(kept[2])


def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
    """Return whether nothing was drawn in between."""
    on_device = first[2] is None or torch.equal(first[2], second[2])
    return first[0] == second[0] and torch.equal(first[1], second[1]) and on_device


@contextmanager
def unchanged(device: torch.device) -> Iterator[None]:
    """Restore the generators on exit."""
    before = states(device)
    try:
        yield
    finally:
        restore(device, before)


def _module(device: torch.device) -> Any:
    module: Any = None if device.type == "cpu" else torch.get_device_module(device)
    return module if hasattr(module, "get_rng_state") else None
