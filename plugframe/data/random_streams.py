"""Random numbers of each rank's own, and the few that must stay equal on all ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import random_split

from plugframe.data.seed import MAX_SEED, PROCESS, ProcessSeed, mix, seed_generators

#: Odd, so that no two indices get the same seed.
_STEP = 0x9E3779B1


class RankStreams:
    """Gives the ranks of the data axis their own random numbers, if `seed_everything` was asked for them.

    Rank 0 of the data axis goes on with the numbers it has: one rank draws what it drew without.

    Args:
        index: of this rank's share of the data; ranks with equal index draw alike.
        count: of shares.
        hooks: those of the job.
    """

    def __init__(self, *, index: int, count: int, hooks: Any) -> None:
        self.index = index
        self.count = count
        self._hooks = hooks
        self._common: torch.Generator | None = None

    def open(self) -> None:
        """Begin with what this process was seeded with."""
        PROCESS.streams = self
        self.seeded(PROCESS)

    def close(self) -> None:
        """Leave the generators as they are, and ``random_split`` as it was."""
        self._give_back()
        if PROCESS.streams is self:
            PROCESS.streams = None

    def seeded(self, process: ProcessSeed) -> None:
        """Note that the process was seeded: all ranks draw alike now, but where a checkpoint gave each its own."""
        self._give_back()
        if process.restored and (process.common is not None or not process.per_rank):
            self._common = None if process.common is None else _common_split(process.common)
        elif process.restored and self.count > 1:
            state = torch.get_rng_state()
            self._common = _common_split(state)
            if self.index:
                self.seed_apart(mix(state.tolist()))
        elif process.per_rank and process.seed is not None and self.count > 1:
            self._common = _common_split(torch.get_rng_state())
            if self.index:
                self.seed_apart(mix(process.seed, "rank"))

    def seed_apart(self, seed: int) -> None:
        """Seed this rank's generators from `seed` and its index."""
        number = (seed + self.index * _STEP) % (MAX_SEED + 1)
        seed_generators(number)
        self._hooks.accelerator_seed(seed=number)

    def state(self) -> torch.Tensor | None:
        """Return the state of the numbers that stay equal, for a checkpoint; None if this rank has no others."""
        return None if self._common is None else self._common.get_state()

    def _give_back(self) -> None:
        if self._common is not None:
            random_split.__defaults__ = (torch.default_generator,)
            self._common = None


def _common_split(state: torch.Tensor) -> torch.Generator:
    """Have ``random_split`` without ``generator=`` draw from `state` on.

    It draws from a default argument. Replacing that, and not the function, reaches scripts that have imported the
    function already. Checked with torch 2.4 to 2.13.
    """
    generator = torch.Generator()
    generator.set_state(state)
    random_split.__defaults__ = (generator,)
    return generator


def restored(common: torch.Tensor | None) -> None:
    """Note that the generators of this process were put back from a checkpoint.

    Args:
        common: what `RankStreams.state` gave when it was saved. If it is None all ranks drew alike then; where
            `seed_everything` now asks for their own numbers, they have them from here on.
    """
    PROCESS.restored = True
    PROCESS.common = None if common is None else common.to(torch.uint8)
    if PROCESS.streams is not None:
        PROCESS.streams.seeded(PROCESS)
