"""``torch.pydevice``: the device module that torch requires, and functions for scripts."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from plugframe_pydevice.memory import Memory

NAME = "pydevice"

memory = Memory()


class _State:
    """The state of this process that a driver would hold."""

    def __init__(self) -> None:
        self.current = 0
        self.generators: dict[int, torch.Generator] = {}


_state = _State()


def device_count() -> int:
    """Return the number of devices: ``PYDEVICE_COUNT``, by default 4."""
    return int(os.environ.get("PYDEVICE_COUNT", "4"))


def is_available() -> bool:
    """Return whether there is a device."""
    return device_count() > 0


def is_initialized() -> bool:
    """Return True: there is nothing to initialize."""
    return True


def _is_in_bad_fork() -> bool:
    return False


def index_of(device: Any) -> int:
    """Return the index of a device, or the current index if it has none."""
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index
    index = _state.current if index is None else index
    if not 0 <= index < device_count():
        raise RuntimeError(f"There is no {NAME}:{index}: this machine has {device_count()}.")
    return index


def current_device() -> int:
    """Return the index of the current device."""
    return _state.current


def set_device(device: Any) -> None:
    """Set the current device."""
    _state.current = index_of(device)


@contextmanager
def device(device: Any) -> Iterator[None]:
    """Set the current device within a context."""
    previous = _state.current
    set_device(device)
    try:
        yield
    finally:
        _state.current = previous


def synchronize(device: Any = None) -> None:
    """Return immediately: every call is synchronous."""


def empty_cache() -> None:
    """Free memory that no tensor uses."""
    memory.collect()


def memory_allocated(device: Any = None) -> int:
    """Return the bytes in use on a device."""
    return memory.allocated_bytes(index_of(device))


def max_memory_allocated(device: Any = None) -> int:
    """Return the peak of the bytes in use on a device."""
    return memory.peak_bytes(index_of(device))


def reset_peak_memory_stats(device: Any = None) -> None:
    """Reset the peak to the bytes now in use."""
    memory.reset_peak(index_of(device))


def manual_seed(seed: int) -> None:
    """Seed the generator of the current device."""
    _generator(_state.current).manual_seed(seed)


def manual_seed_all(seed: int) -> None:
    """Seed the generators of all devices; ``torch.manual_seed`` calls it."""
    for index in range(device_count()):
        _generator(index).manual_seed(seed)


def get_rng_state(device: Any = None) -> Tensor:
    """Return the state of a device's generator."""
    return _generator(index_of(device)).get_state()


def set_rng_state(state: Tensor, device: Any = None) -> None:
    """Restore a state returned by `get_rng_state`."""
    _generator(index_of(device)).set_state(state)


def get_amp_supported_dtype() -> list[torch.dtype]:
    """Return the dtypes that ``torch.autocast`` supports."""
    return [torch.bfloat16, torch.float16]


def _generator(index: int) -> torch.Generator:
    return _state.generators.setdefault(index, torch.Generator())


# ---------------------------------------------------------------------- streams: every call is synchronous


class Event(torch.Event):
    """An event that is always complete."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Event:
        return super().__new__(cls, device=NAME)

    def record(self, stream: torch.Stream | None = None) -> None:
        pass

    def wait(self, stream: torch.Stream | None = None) -> None:
        pass

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


class Stream(torch.Stream):
    """The single stream of a device."""

    def __new__(cls, device: Any = None, priority: int = 0) -> Stream:
        return super().__new__(cls, device=NAME if device is None else device)

    def wait_stream(self, stream: torch.Stream) -> None:
        pass

    def wait_event(self, event: torch.Event) -> None:
        pass

    def record_event(self, event: torch.Event | None = None) -> torch.Event:
        return Event() if event is None else event

    def synchronize(self) -> None:
        pass

    def query(self) -> bool:
        return True


def current_stream(device: Any = None) -> Stream:
    """Return the stream of a device."""
    return Stream(device)


@contextmanager
def stream(stream: torch.Stream | None) -> Iterator[None]:
    """Do nothing: there is a single stream."""
    yield
