"""The order of samples: a function of seed, loader and epoch, the same on every rank and for any number of ranks."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import sampler as torch_samplers


class Order:
    """Random numbers for the samplers of one loader, apart from those of the training.

    A sampler without a generator of its own draws from the process's global generators, which the ranks of a
    job advance differently. Here it draws from generators seeded by (seed, loader, epoch) instead, and the
    global ones are put back after each draw.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed = seed
        self.number = number

    def start(self, sampler: Any, epoch: int) -> Draws:
        """Return the random numbers for one epoch of `sampler`."""
        return Draws(_mix(self.seed, self.number, epoch), every=not _draws_at_once(sampler))


class Draws:
    """The random numbers of one epoch.

    Attributes:
        every: whether they are needed at every draw, or at the first alone.
    """

    def __init__(self, seed: int, *, every: bool) -> None:
        self.every = every
        self._states: tuple[Any, Any, Any] | None = _seeded(seed)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let what runs inside draw from these numbers."""
        if self._states is None:
            yield
            return
        outside = _get()
        _set(self._states)
        try:
            yield
        finally:
            self._states = _get() if self.every else None
            _set(outside)


def owns_generator(sampler: Any) -> bool:
    """Say whether the user gave the sampler a generator, whose numbers it then draws."""
    return isinstance(getattr(sampler, "generator", None), torch.Generator)


def _draws_at_once(sampler: Any) -> bool:
    """torch's own samplers draw whatever they draw before they yield the first index."""
    return type(sampler).__module__ == torch_samplers.__name__


def _mix(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _numpy() -> Any:
    # Only if the program uses it: importing NumPy for its generator would cost more than it protects.
    return sys.modules.get("numpy.random")


def _seeded(seed: int) -> tuple[Any, Any, Any]:
    numpy = _numpy()
    return (
        torch.Generator().manual_seed(seed).get_state(),
        random.Random(seed).getstate(),
        numpy.RandomState(seed % 2**32).get_state() if numpy else None,
    )


def _get() -> tuple[Any, Any, Any]:
    numpy = _numpy()
    return torch.get_rng_state(), random.getstate(), numpy.get_state() if numpy else None


def _set(states: tuple[Any, Any, Any]) -> None:
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    numpy = _numpy()
    if numpy and states[2] is not None:
        numpy.set_state(states[2])
