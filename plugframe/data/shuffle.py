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

from plugframe.utils.rng import RngSnapshot, capture_rng, pack, unpack


class Shuffle:
    """Random streams for the samples of one loader, separate from those of the training.

    A sampler or an iterable dataset without a generator of its own draws from the process's global generators,
    whose states differ between ranks. Here it draws from generators seeded by (seed, loader, epoch) instead, and the
    global ones are restored after each draw. Instances are pickled into worker processes.
    """

    def __init__(self, seed: int, number: int) -> None:
        self.seed = seed
        self.number = number

    def seed_of(self, epoch: int, *indices: int) -> int:
        """Return a seed for a place in an epoch, such as (rank, batch)."""
        return _mix(self.seed, self.number, epoch, -1, *indices)

    def random_stream(self, epoch: int, *, every: bool, stream: int = 0) -> RandomStream:
        """Return the random numbers for one epoch.

        Args:
            every: whether every draw uses them, or only the first.
            stream: index of the stream, where several are used in one epoch.
        """
        return RandomStream(_mix(self.seed, self.number, epoch, stream), every=every)


class RandomStream:
    """The random numbers of one epoch.

    Attributes:
        every: whether every draw uses them, or only the first.
    """

    def __init__(self, seed: int, *, every: bool) -> None:
        self._seed = seed
        self.every = every
        self._exhausted = False
        self._snapshot = RngSnapshot(torch.Generator().manual_seed(seed).get_state(), random.Random(seed).getstate())
        self._numpy: Any = None

    def state(self) -> dict[str, Any]:
        """Return the states of the generators, for a checkpoint."""
        others = self._snapshot.python, None if self._numpy is None else self._numpy.state
        return {"torch": self._snapshot.torch, "others": pack(others)}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Restore a state returned by `state`."""
        python, numpy_state = unpack(state["others"])
        self._snapshot = RngSnapshot(unpack(state["torch"]), python)
        if numpy_state is not None:
            numpy = importlib.import_module("numpy.random")
            self._numpy = numpy.MT19937(0)
            self._numpy.state = numpy_state

    @contextmanager
    def active(self) -> Iterator[None]:
        """Make the global generators draw from this stream inside the block."""
        if self._exhausted:
            yield
            return
        outside = capture_rng(numpy=False)
        self._snapshot.restore()
        try:
            with self._active_numpy():
                yield
        finally:
            self._exhausted = not self.every
            self._snapshot = capture_rng(numpy=False)
            outside.restore()

    @contextmanager
    def _active_numpy(self) -> Iterator[None]:
        # Only if the program uses NumPy: importing it for its generator costs more than it protects.
        numpy = sys.modules.get("numpy.random")
        if numpy is None:
            yield
            return
        if self._numpy is None:
            self._numpy = numpy.MT19937(self._seed)
        # Swap the generator and not its state, which would take 100 µs. NumPy loses at most one normal number, the
        # second of a pair, which it stores beside the generator.
        outside = numpy.get_bit_generator()
        numpy.set_bit_generator(self._numpy)
        try:
            yield
        finally:
            numpy.set_bit_generator(outside)


def _mix(*values: int) -> int:
    digest = hashlib.blake2b(repr(values).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
