"""The order of samples: a function of seed, loader and epoch, the same on every rank and for any number of ranks."""

from __future__ import annotations

import hashlib
import importlib
import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from plugframe.data.random_sources import pack, unpack


class Order:
    """Random numbers for the samples of one loader, apart from those of the training.

    A sampler or an iterable dataset without a generator of its own draws from the process's global generators,
    which the ranks of a job advance differently. Here it draws from generators seeded by (seed, loader, epoch)
    instead, and the global ones are put back after each draw. It is pickled into worker processes.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed = seed
        self.number = number

    def seed_of(self, epoch: int, *place: int) -> int:
        """Return a seed for what is drawn at a place of an epoch: the number of a batch and of a rank, say."""
        return _mix(self.seed, self.number, epoch, -1, *place)

    def draws(self, epoch: int, *, every: bool, part: int = 0) -> Draws:
        """Return the random numbers for one epoch.

        Args:
            every: whether they are needed at every draw, or at the first alone.
            part: which of several that draw in the same epoch.
        """
        return Draws(_mix(self.seed, self.number, epoch, part), every=every)


class Draws:
    """The random numbers of one epoch.

    Attributes:
        every: whether they are needed at every draw, or at the first alone.
    """

    def __init__(self, seed: int, *, every: bool) -> None:
        self._seed = seed
        self.every = every
        self._over = False
        self._torch = torch.Generator().manual_seed(seed).get_state()
        self._python = random.Random(seed).getstate()
        self._numpy: Any = None

    def state(self) -> dict[str, Any]:
        """Return where the generators are, for a checkpoint."""
        others = self._python, None if self._numpy is None else self._numpy.state
        return {"torch": self._torch, "others": pack(others)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on where `state` was asked."""
        self._torch = unpack(state["torch"])
        self._python, numpy_state = unpack(state["others"])
        if numpy_state is not None:
            numpy = importlib.import_module("numpy.random")
            self._numpy = numpy.MT19937(0)
            self._numpy.state = numpy_state

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Let what runs inside draw from these numbers."""
        if self._over:
            yield
            return
        outside = torch.get_rng_state(), random.getstate()
        torch.set_rng_state(self._torch)
        random.setstate(self._python)
        try:
            with self._drawing_numpy():
                yield
        finally:
            self._over = not self.every
            self._torch, self._python = torch.get_rng_state(), random.getstate()
            torch.set_rng_state(outside[0])
            random.setstate(outside[1])

    @contextmanager
    def _drawing_numpy(self) -> Iterator[None]:
        # Only if the program uses it: importing NumPy for its generator would cost more than it protects.
        numpy = sys.modules.get("numpy.random")
        if numpy is None:
            yield
            return
        if self._numpy is None:
            self._numpy = numpy.MT19937(self._seed)
        # The generator changes places, not its state: that would take 100 µs. What NumPy loses is at most one
        # normal number, the second of a pair, which it keeps beside the generator.
        outside = numpy.get_bit_generator()
        numpy.set_bit_generator(self._numpy)
        try:
            yield
        finally:
            numpy.set_bit_generator(outside)


def _mix(*parts: int) -> int:
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
