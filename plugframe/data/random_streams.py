"""Random numbers that differ between ranks, and the few that must stay equal on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import random_split

from plugframe.data.seed import MAX_SEED, PROCESS, ProcessSeed, mix, seed_generators

#: Odd, so that no two indices get the same seed.
_STEP = 0x9E3779B1


class RankStreams:
    """Seed the ranks of the data axis differently, if `seed_everything` was called with ``per_rank=True``.

    Rank 0 of the data axis keeps its numbers, so a run on one rank is unchanged.

    Args:
        index: data shard of this rank; ranks with the same index draw the same numbers.
        count: number of data shards.
        hooks: hooks of the job.
    """

    def __init__(self, *, index: int, count: int, hooks: Any) -> None:
        self.index = index
        self.count = count
        self._hooks = hooks
        self._common: torch.Generator | None = None

    def open(self) -> None:
        """Seed this rank from the seed of the process, and register for later seeds."""
        PROCESS.streams = self
        self.on_seed(PROCESS)

    def close(self) -> None:
        """Unregister and restore ``random_split``; the generators keep their states."""
        self._restore_random_split()
        if PROCESS.streams is self:
            PROCESS.streams = None

    def on_seed(self, process: ProcessSeed) -> None:
        """Update this rank's generators after the process was seeded, or restored from a checkpoint."""
        self._restore_random_split()
        if process.restored and (process.common is not None or not process.per_rank):
            self._common = None if process.common is None else _patch_random_split(process.common)
        elif process.restored and self.count > 1:
            state = torch.get_rng_state()
            self._common = _patch_random_split(state)
            if self.index:
                self.seed_rank(mix(state.tolist()))
        elif process.per_rank and process.seed is not None and self.count > 1:
            self._common = _patch_random_split(torch.get_rng_state())
            if self.index:
                self.seed_rank(mix(process.seed, "rank"))

    def seed_rank(self, seed: int) -> None:
        """Seed this rank's generators from `seed` and its index."""
        number = (seed + self.index * _STEP) % (MAX_SEED + 1)
        seed_generators(number)
        self._hooks.accelerator_seed(seed=number)

    def state(self) -> torch.Tensor | None:
        """Return the state of the generator that is equal on all ranks, for a checkpoint; None if there is none."""
        return None if self._common is None else self._common.get_state()

    def _restore_random_split(self) -> None:
        if self._common is not None:
            random_split.__defaults__ = (torch.default_generator,)
            self._common = None


def _patch_random_split(state: torch.Tensor) -> torch.Generator:
    """Make ``random_split`` without ``generator=`` draw from a generator in `state`; return the generator.

    A hack: ``random_split`` reads the generator from a default argument. Replacing the default, and not the function,
    reaches scripts that have imported the function already. Checked with torch 2.4 to 2.13.
    """
    generator = torch.Generator()
    generator.set_state(state)
    random_split.__defaults__ = (generator,)
    return generator


def on_restore(common: torch.Tensor | None) -> None:
    """Update the random streams after the generators of this process were restored from a checkpoint.

    Args:
        common: result of `RankStreams.state` when the checkpoint was saved. If it is None, all ranks drew the same
            numbers then; with ``per_rank=True`` now, they differ from here on.
    """
    PROCESS.restored = True
    PROCESS.common = None if common is None else common.to(torch.uint8)
    if PROCESS.streams is not None:
        PROCESS.streams.on_seed(PROCESS)
