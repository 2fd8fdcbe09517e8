"""Agreement of the ranks on which parts of a sharded model run, and in which order.

torch gathers units in the order in which each rank comes to them, and mixes parts of different units where ranks
come to different ones. A forward that goes the way all ranks went before costs one exchange of a few bytes, which is
waited for in backward; at every other unit the ranks meet before it is gathered.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.errors import CollectiveMismatchError
from plugframe.hooks.context import Context

_END = -1
#: Of so many forwards, how many may go another way than foreseen before every unit is met at.
_WATCHED, _MISSES, _KNOWN = 8, 2, 64
_BETWEEN = ("plugframe", "plugframe_builtins", "torch", "contextlib", "functools")


class Channel:
    """A connection of the ranks on the host, besides that of the parameters.

    Attributes:
        open: whether there is another rank to talk to.
    """

    def __init__(self, context: Context) -> None:
        self._group: Any = None
        collective = context.provides.get("collective", ())
        real = dist.is_initialized() and "gloo" in dist.get_backend_config(dist.group.WORLD)
        self.open = context.world.world_size > 1 and real and "process-group" in collective
        if self.open:
            timeout = None if context.timeout_s is None else timedelta(seconds=context.timeout_s)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._num_ranks = context.world.world_size

    def send(self, mine: Tensor) -> Exchange:
        """Begin to exchange a tensor of one dimension with all ranks."""
        rows = torch.empty(self._num_ranks, mine.numel(), dtype=mine.dtype)
        return Exchange(dist.all_gather(list(rows.unbind()), mine, group=self._group, async_op=True), rows)

    def close(self) -> None:
        """Give the connection up."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self.open = None, False


class Exchange:
    """What all ranks send, row by row, once it has come."""

    def __init__(self, work: Any, rows: Tensor) -> None:
        self._work = work
        self._rows = rows

    def ready(self) -> bool:
        """Say whether it has come."""
        return bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """Return it: a tensor of shape (ranks, elements)."""
        self._work.wait()
        return self._rows


class Paths:
    """The way through the units of one model.

    Args:
        channel: to the other ranks.
        number: of the model among those of the job.
        names: of the units.
        gather: gathers a unit and frees it, as a rank does that runs it.
        model: its class, for messages.
        evaluated: gives a checksum of how the last evaluation went, compared along.
    """

    def __init__(
        self,
        channel: Channel,
        number: int,
        names: Sequence[str],
        gather: Callable[[int], None],
        model: str,
        evaluated: Callable[[], int],
    ) -> None:
        self._channel = channel
        self._number = number
        self._names = names
        self._gather = gather
        self._model = model
        self._evaluated = evaluated
        self._expected: list[int] | None = None
        self._way: list[int] = []
        self._next: dict[tuple[int, ...], list[int]] = {}
        self._hits: deque[bool] = deque(maxlen=_WATCHED)
        self._foreseen: list[int] | None = None
        self._last: tuple[int, ...] = ()
        self._pending: Exchange | None = None
        self._sent: list[int] = []

    def begin(self) -> None:
        """A forward begins."""
        self.settle()
        self._way = []
        self._foreseen = self._next.get(self._last)
        trusted = self._foreseen is not None and self._hits.count(False) <= _MISSES
        self._expected = self._foreseen if trusted else None

    def come(self, unit: int) -> None:
        """The forward comes to a unit, which is gathered after this.

        Raises:
            CollectiveMismatchError: if another rank has come to another one.
        """
        position = len(self._way)
        if self._expected is not None and position < len(self._expected) and self._expected[position] == unit:
            self._way.append(unit)
            return
        self._meet(position, unit)
        self._way.append(unit)

    def end(self) -> None:
        """The forward has ended."""
        position = len(self._way)
        if self._expected is not None and position == len(self._expected):
            self._send(position, _END)
        else:
            self._meet(position, _END)
        self._hits.append(self._foreseen == self._way)
        if len(self._next) > _KNOWN:
            self._next.clear()
        self._next[self._last] = list(self._way)
        self._last = tuple(self._way)

    def settle(self) -> None:
        """Wait for what was sent at the end of the last forward.

        Raises:
            CollectiveMismatchError: if another rank went another way.
        """
        if self._pending is not None:
            exchange, self._pending = self._pending, None
            self._compare(exchange.wait())

    def arrived(self) -> bool:
        """Say whether what was sent at the end of the last forward has come, so that `settle` does not wait."""
        return self._pending is not None and self._pending.ready()

    def _send(self, position: int, unit: int) -> None:
        self._sent = [self._number, position, unit, self._evaluated()]
        self._pending = self._channel.send(torch.tensor(self._sent))

    def _meet(self, position: int, unit: int) -> None:
        if self._expected is not None:
            # Ranks that went the foreseen way are on it, to its end.
            for other in self._expected[position:]:
                self._gather(other)
            self._expected = None
        self._send(position, unit)
        self.settle()

    def _compare(self, rows: Tensor) -> None:
        if bool((rows == rows[0]).all()):
            return
        if bool((rows[:, :3] == rows[0, :3]).all()):
            raise CollectiveMismatchError(
                f"In the evaluation before, the ranks ran different parts of this {self._model}: what it gave is of "
                "mixed weights. A sharded part needs all ranks: let every rank run the same parts."
            )
        mine = self._sent
        others: dict[str, list[int]] = {}
        for rank, row in enumerate(rows.tolist()):
            if row != mine:
                others.setdefault(self._text(row), []).append(rank)
        told = "; ".join(f"rank {', '.join(map(str, ranks))} {text}" for text, ranks in others.items())
        raise CollectiveMismatchError(
            f"The ranks run different parts of this {self._model} in one forward: this one "
            f"{self._text(mine)}{_line()}; {told}. A sharded part needs all ranks: let every rank run the "
            "same parts (weigh an unused one with 0), or keep the parts that differ whole, with "
            "units= set to other classes."
        )

    def _text(self, row: list[int]) -> str:
        number, _, unit, _ = row
        if number != self._number:
            return "runs another model"
        return "comes to its end" if unit == _END else f"comes to {self._names[unit]!r}"


def _line() -> str:
    """Return the user's line that runs the unit."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in _BETWEEN:
            return f" ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
