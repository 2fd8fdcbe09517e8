"""Verify that all ranks run the same parts of a sharded model, before what one gathers is taken for another part.

ZeRO stage 3 gathers a part from all ranks when a forward or a backward comes to it, in the order in which that happens:
ranks that come to different parts would mix their shards. A rank that comes to what it came to in the step before
talks to nobody. One that comes to something else first hears from all ranks where they are, on a group of its own.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from plugframe.errors import CollectiveMismatchError

#: How many different steps are remembered: models that alternate between a few ways of running talk once a step.
_NUM_KNOWN = 16
#: How long a rank waits for the others where its step is a new one. They meet at every part, so all are near.
_TIMEOUT_S = 60.0
_END = "the optimizer's step"
#: Bytes of a place between ranks.
_WIDTH = 256

#: Says where this rank is; raises unless all ranks say the same.
Agree = Callable[[str], None]


class Agreement:
    """What the ranks tell each other where a step is not as the one before.

    Args:
        num_ranks: of the job. Every rank makes one at the same time.
        timeout_s: how long to wait for the others.
    """

    def __init__(self, num_ranks: int, timeout_s: float = _TIMEOUT_S) -> None:
        self._num_ranks = num_ranks
        self._timeout_s = timeout_s
        # On the host, whatever the device: nothing in it waits for an accelerator.
        self._group: Any = dist.new_group(backend="gloo", timeout=datetime.timedelta(seconds=timeout_s))

    def __call__(self, place: str, before: str | None, remedy: str) -> None:
        """Return if every rank calls it with the same `place`.

        Args:
            before: where this rank came in the step before instead, None if that step had ended or there was none.
            remedy: what to do, for the error.

        Raises:
            CollectiveMismatchError: on all ranks, naming where they are; or, after the timeout, on those that wait.
        """
        mine = torch.frombuffer(bytearray(place.encode()[:_WIDTH].ljust(_WIDTH)), dtype=torch.uint8)
        rows = [torch.empty_like(mine) for _ in range(self._num_ranks)]
        try:
            dist.all_gather(rows, mine, group=self._group)
        except RuntimeError as error:
            raise CollectiveMismatchError(
                f"This rank came to {place} where the step before came to {before or 'its end'}, and not all other "
                f"ranks did within {self._timeout_s:g} s: they run other parts of the model. {remedy}"
            ) from error
        places = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in rows]
        if len(set(places)) > 1:
            told = ", ".join(f"rank {rank} came to {each}" for rank, each in enumerate(places))
            raise CollectiveMismatchError(f"Ranks run different parts of the model in one step: {told}. {remedy}")

    def close(self) -> None:
        """Give the group back."""
        if dist.is_initialized():
            dist.destroy_process_group(self._group)


class Trace:
    """The places a rank comes to between two optimizer steps, followed along those of earlier steps.

    Args:
        agree: called with a new place and the one expected there.
    """

    def __init__(self, agree: Callable[[str, str | None], None]) -> None:
        self._agree = agree
        self._known: list[list[str]] = []
        self._expected: list[str] = []
        self._now: list[str] = []

    def come(self, place: str) -> None:
        """Take in where this rank is now."""
        number = len(self._now)
        expected = self._expected[number] if number < len(self._expected) else None
        self._now.append(place)
        if expected != place:
            self._agree(place, expected)
            now = self._now
            self._expected = next((known for known in reversed(self._known) if known[: len(now)] == now), [])

    def end(self) -> None:
        """Begin a new step."""
        if not self._now:
            return
        self.come(_END)
        if self._now in self._known:
            self._known.remove(self._now)
        self._known.append(self._now)
        del self._known[:-_NUM_KNOWN]
        self._expected, self._now = self._now, []
