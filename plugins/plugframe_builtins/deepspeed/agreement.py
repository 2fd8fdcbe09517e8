"""Verify that all ranks run the same modules of a sharded model, before gathered parameters are mixed up.

ZeRO stage 3 gathers a module's parameters from all ranks in the order in which forwards and backwards run:
ranks in different orders would mix their shards. A rank in the same order as in the step before does not
communicate. On a deviation it first compares positions with all ranks, in a separate process group.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from plugframe.errors import CollectiveMismatchError

#: Number of different steps remembered: models that alternate between a few orders communicate once a step.
_NUM_KNOWN = 16
#: Timeout of a comparison. Ranks synchronise at every module, so all are close.
_TIMEOUT_S = 60.0
_END = "the optimizer's step"
#: Bytes of an encoded position.
_WIDTH = 256

#: Compares this rank's position; raises unless all ranks are at the same.
Agree = Callable[[str], None]


class Agreement:
    """Compare positions over ranks where a step deviates from the one before.

    Args:
        num_ranks: number of ranks. All ranks must construct it at the same time.
        timeout_s: timeout of a comparison.
    """

    def __init__(self, num_ranks: int, timeout_s: float = _TIMEOUT_S) -> None:
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        # On the host, whatever the device: no accelerator is waited for.
        self._group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def __call__(self, place: str, before: str | None, remedy: str) -> None:
        """Return if every rank calls it with the same `place`.

        Args:
            before: the position in the step before, None if that step had ended or there was none.
            remedy: advice for the error.

        Raises:
            CollectiveMismatchError: on all ranks, with their positions; after the timeout, on the waiting ranks.
        """
        mine = torch.frombuffer(bytearray(place.encode()[:_WIDTH].ljust(_WIDTH)), dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        try:
            dist.all_gather(rows, mine, group=self._group)
        except RuntimeError as error:
            raise CollectiveMismatchError(
                f"This rank reached {place} where the step before reached {before or 'its end'}, and not all other "
                f"ranks did within {self._timeout_s:g} s: they run other submodules. {remedy}"
            ) from error
        places = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
        if len(set(places)) > 1:
            positions = ", ".join(f"rank {rank} reached {each}" for rank, each in enumerate(places))
            raise CollectiveMismatchError(f"Ranks run different submodules in one step: {positions}. {remedy}")

    def close(self) -> None:
        """Destroy the process group."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)


class Trace:
    """The positions of a rank between two optimizer steps, compared with those of earlier steps.

    Args:
        agree: called with a new position and the expected one.
    """

    def __init__(self, agree: Callable[[str, str | None], None]) -> None:
        self._agree = agree
        self._known: list[list[str]] = []
        self._expected: list[str] = []
        self._now: list[str] = []

    def record(self, place: str) -> None:
        """Record the current position."""
        number = len(self._now)
        expected = self._expected[number] if number < len(self._expected) else None
        self._now.append(place)
        if expected != place:
            self._agree(place, expected)
            now = self._now
            self._expected = next((known for known in reversed(self._known) if known[: len(now)] == now), [])

    def end(self) -> None:
        """Start a new step."""
        if not self._now:
            return
        self.record(_END)
        if self._now in self._known:
            self._known.remove(self._now)
        self._known.append(self._now)
        del self._known[:-_NUM_KNOWN]
        self._expected, self._now = self._now, []
