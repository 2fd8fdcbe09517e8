"""Comparing over ranks, at every optimizer step, what must be the same: learning rates, other settings, step counts."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.optim import Optimizer

from plugframe.errors import OutOfSyncError

if TYPE_CHECKING:
    from plugframe.adopt.module import Phase

#: Settings that travel by themselves, so that the message can name them; the others are compared by a hash.
_NAMED = 16
_STEPS, _BACKWARDS, _HASH = range(3)

Row = list[float]
#: Waits for what every rank has sent, and returns it by rank.
Pending = Callable[[], Sequence[Sequence[float]]]


class Comparison:
    """Compares an optimizer's settings with those of the other ranks, one step later and without waiting for a device.

    The numbers of a step are sent when it begins and looked at when the next one does: they arrived meanwhile.
    Ranks that differ make one step too many, and then all of them stop.

    Args:
        send: begins to exchange a few numbers; returns None where that cannot be done beside everything else.
        phase: counts the backwards that exchanged gradients.
    """

    def __init__(self, optimizer: Optimizer, send: Callable[..., Pending | None], phase: Phase) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._send = send
        self._phase = phase
        self._able = True
        self._pending: Pending | None = None
        self._names: list[str] = []
        self._sent: list[Any] = []
        self._hash = 0.0
        self._row: Row = []

    def __call__(self, steps: int) -> None:
        """Look at the numbers of the last step, and send those of this one. Every rank must call it.

        Raises:
            OutOfSyncError: on all ranks, naming the parameter group and the values of the ranks.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._look(self._wait(pending))
        optimizer = self._optimizer()
        if optimizer is None or not self._able:
            return
        settings: list[Any] = []
        for group in optimizer.param_groups:
            _add_values(group, settings)
        if settings != self._sent:
            self._sent = settings
            self._hash = float(zlib.crc32(repr(settings).encode()))
            named = [pair for number, group in enumerate(optimizer.param_groups) for pair in _named(number, group)]
            self._names = [name for name, _ in named[:_NAMED]]
            self._row = [value for _, value in named[:_NAMED]] + [0.0] * (_NAMED - len(named))
        values = [float(steps), float(self._phase.backwards), self._hash, *self._row]
        self._pending = self._send(values=values, look=self._look)
        if self._pending is None:
            self._able = False

    def _wait(self, pending: Pending) -> Sequence[Sequence[float]]:
        try:
            return pending()
        except RuntimeError as error:
            failure = self._phase.explain(error) if self._phase.explain is not None else None
            if failure is None:
                raise
            raise failure from error

    def _look(self, rows: Sequence[Sequence[float]]) -> None:
        if not rows:  # they ride along, and were looked at
            return
        first = repr(rows[0])
        if all(repr(row) == first for row in rows[1:]):
            return
        columns = list(zip(*rows, strict=True))
        optimizer = type(self._optimizer()).__name__
        for index in (_STEPS, _BACKWARDS):
            if len(set(columns[index])) > 1:
                counts = _by_rank([int(value) for value in columns[_BACKWARDS]])
                raise OutOfSyncError(
                    f"The ranks do not make the same steps of {optimizer}: before its step "
                    f"{int(columns[_STEPS][0]) + 1} the number of backwards is {counts}. A condition that holds on "
                    "some ranks decides about step() or backward(): decide by what lite.all_reduce() gives."
                )
        for name, column in zip(self._names, columns[_HASH + 1 :], strict=False):
            if len(set(map(repr, column))) > 1:
                raise OutOfSyncError(
                    f"{name} of {optimizer} differs between the ranks: {_by_rank(column)}. All must step alike: give a "
                    "schedule that looks at a loss, such as ReduceLROnPlateau, that of all ranks, "
                    "scheduler.step(lite.all_reduce(loss))."
                )
        raise OutOfSyncError(
            f"The settings of {optimizer} differ between the ranks in a parameter group (learning rate, momentum, …): "
            "make it alike on every rank, and give a schedule the loss of all ranks, lite.all_reduce(loss)."
        )


#: Types that are compared as they are, looked up because this runs for every key of every group at every step.
_PLAIN = frozenset((int, float, bool, tuple))


def _add_values(group: dict[str, Any], values: list[Any]) -> None:
    """Append what is compared of a group: plain numbers, tuples of them, and tensors on the CPU."""
    for key, value in group.items():
        if type(value) in _PLAIN:
            values.append(value)
        elif value is None:
            continue
        elif key == "params":
            values.append(len(value))
        elif isinstance(value, Tensor):
            if value.device.type == "cpu" and value.numel() == 1:
                values.append(value.item())
        elif isinstance(value, (int, float, tuple)):
            values.append(value)


def _named(number: int, group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a group by name, the learning rate first."""
    for key in sorted(group, key=lambda key: (key != "lr", key)):
        value = group[key]
        if isinstance(value, Tensor) and value.device.type == "cpu" and value.numel() == 1:
            value = value.item()
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, int | float) and not isinstance(item, bool):
                yield f"{key!r} in parameter group {number}", float(item)


def _by_rank(values: Sequence[Any]) -> str:
    shown = [f"{value:.6g} on rank {rank}" for rank, value in enumerate(values)]
    others = [text for text, value in zip(shown, values, strict=True) if value != values[0]]
    return ", ".join([shown[0], *others[:3]]) + (", …" if len(others) > 3 else "")
