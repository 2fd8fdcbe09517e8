"""Check that all ranks run the same units of a sharded model in the same order.

torch gathers units in each rank's own order, and mixes up parameters where ranks
run different ones. A forward in the order of the previous one costs one all-gather of a few bytes, awaited
in backward; any other unit is compared over ranks before it is gathered.
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
#: Forwards remembered, deviations among them from which every unit is compared, and most orders stored.
_WATCHED, _MISSES, _KNOWN = 8, 2, 64
_BETWEEN = ("plugframe", "plugframe_builtins", "torch", "contextlib", "functools")


class Channel:
    """Host-side communication between the ranks, separate from that of parameters.

    Attributes:
        open: whether there are other ranks.
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
        """Start an all-gather of a 1-d tensor."""
        rows = torch.empty(self._num_ranks, mine.numel(), dtype=mine.dtype)
        return Exchange(dist.all_gather(list(rows.unbind()), mine, group=self._group, async_op=True), rows)

    def close(self) -> None:
        """Release the process group."""
        if self._group is not None and dist.is_initialized():
            dist.destroy_process_group(self._group)
        self._group, self.open = None, False


class Exchange:
    """A running all-gather, with a row per rank."""

    def __init__(self, work: Any, rows: Tensor) -> None:
        self._work = work
        self._rows = rows

    def ready(self) -> bool:
        """Return whether it is complete."""
        return bool(self._work.is_completed())

    def wait(self) -> Tensor:
        """Wait, and return a tensor of shape (ranks, elements)."""
        self._work.wait()
        return self._rows


class UnitOrder:
    """The order in which one model's units are gathered.

    Args:
        channel: communicates with the other ranks.
        number: index of the model in the session.
        names: of the units.
        gather: gathers a unit and reshards it, as running it does.
        model: class name, for messages.
        evaluated: returns a checksum of the last evaluation's order, compared along with the forward's.
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
        """Start a forward."""
        self.settle()
        self._way = []
        self._foreseen = self._next.get(self._last)
        trusted = self._foreseen is not None and self._hits.count(False) <= _MISSES
        self._expected = self._foreseen if trusted else None

    def record(self, unit: int) -> None:
        """Record a unit of the forward, before it is gathered.

        Raises:
            CollectiveMismatchError: if another rank runs a different unit.
        """
        position = len(self._way)
        if self._expected is not None and position < len(self._expected) and self._expected[position] == unit:
            self._way.append(unit)
            return
        self._synchronize(position, unit)
        self._way.append(unit)

    def end(self) -> None:
        """End the forward, and send its order."""
        position = len(self._way)
        if self._expected is not None and position == len(self._expected):
            self._send(position, _END)
        else:
            self._synchronize(position, _END)
        self._hits.append(self._foreseen == self._way)
        if len(self._next) > _KNOWN:
            self._next.clear()
        self._next[self._last] = list(self._way)
        self._last = tuple(self._way)

    def settle(self) -> None:
        """Wait for the comparison of the last forward.

        Raises:
            CollectiveMismatchError: if another rank's order differs.
        """
        if self._pending is not None:
            exchange, self._pending = self._pending, None
            self._compare(exchange.wait())

    def arrived(self) -> bool:
        """Return whether the comparison of the last forward is complete, so that `settle` does not wait."""
        return self._pending is not None and self._pending.ready()

    def _send(self, position: int, unit: int) -> None:
        self._sent = [self._number, position, unit, self._evaluated()]
        self._pending = self._channel.send(torch.tensor(self._sent))

    def _synchronize(self, position: int, unit: int) -> None:
        if self._expected is not None:
            # Ranks that followed the expected order continue to its end.
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
                f"In the evaluation before, the ranks ran different submodules of this {self._model}, so that the "
                "result is of mixed weights. A sharded submodule needs all ranks: let every rank run the same ones."
            )
        mine = self._sent
        others: dict[str, list[int]] = {}
        for rank, row in enumerate(rows.tolist()):
            if row != mine:
                others.setdefault(self._text(row), []).append(rank)
        elsewhere = "; ".join(f"rank {', '.join(map(str, ranks))} {text}" for text, ranks in others.items())
        raise CollectiveMismatchError(
            f"The ranks run different submodules of this {self._model} in one forward: this one "
            f"{self._text(mine)}{_line()}; {elsewhere}. A sharded submodule needs all ranks: let every rank run "
            "the same submodules (weigh an unused one with 0), or set units= to classes without the submodules that "
            "differ."
        )

    def _text(self, row: list[int]) -> str:
        number, _, unit, _ = row
        if number != self._number:
            return "runs another model"
        return "reaches its end" if unit == _END else f"runs {self._names[unit]!r}"


def _line() -> str:
    """Return the line of user code that runs the unit."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        package = str(frame.f_globals.get("__name__")).partition(".")[0]
        if package not in _BETWEEN:
            return f" ({frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno})"
        frame = frame.f_back
    return ""
