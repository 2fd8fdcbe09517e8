"""Compare optimizer settings between ranks at every step: learning rates, other settings, numbers of steps."""

from __future__ import annotations

import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from plugframe.adopt.job_state import JobState
from plugframe.errors import OutOfSyncError

#: Number of settings sent as values, so that the message can name them; all others are compared by a hash.
_MAX_NAMED = 16
_STEPS, _BACKWARDS, _HASH = range(3)

Row = list[float]
#: Waits for the rows of all ranks, and returns them by rank.
Pending = Callable[[], Sequence[Sequence[float]]]


class SettingsCheck:
    """Compares an optimizer's settings between ranks, one step later and without waiting for a device.

    The row of a step is sent when the step begins and compared when the next one does, when it has arrived. Ranks that
    differ make one step too many before all raise.

    Args:
        send: starts a gather of a few numbers; returns None if it cannot run asynchronously.
        job: state of the job, with the number of backwards that synchronised gradients.
    """

    def __init__(self, optimizer: Optimizer, send: Callable[..., Pending | None], job: JobState) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._send = send
        self._job = job
        self._supported = True
        self._pending: Pending | None = None
        self._names: list[str] = []
        self._sent: list[Any] = []
        self._hash = 0.0
        self._row: Row = []

    def __call__(self, steps: int) -> None:
        """Compare the rows of the last step, and send that of this one. Every rank must call it.

        Raises:
            OutOfSyncError: on all ranks, with the parameter group and the values of the ranks.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            self._compare(self._wait(pending))
        optimizer = self._optimizer()
        if optimizer is None or not self._supported:
            return
        settings: list[Any] = []
        for group in optimizer.param_groups:
            _add_values(group, settings)
        if settings != self._sent:
            self._sent = settings
            self._hash = float(zlib.crc32(repr(settings).encode()))
            named = [
                pair for number, group in enumerate(optimizer.param_groups) for pair in _named_values(number, group)
            ]
            self._names = [name for name, _ in named[:_MAX_NAMED]]
            self._row = [value for _, value in named[:_MAX_NAMED]] + [0.0] * (_MAX_NAMED - len(named))
        values = [float(steps), float(self._job.num_backwards), self._hash, *self._row]
        self._pending = self._send(values=values, look=self._compare)
        if self._pending is None:
            self._supported = False

    def _wait(self, pending: Pending) -> Sequence[Sequence[float]]:
        try:
            return pending()
        except RuntimeError as error:
            explanation = self._job.explain_error(error) if self._job.explain_error is not None else None
            if explanation is None:
                raise
            raise explanation from error

    def _compare(self, rows: Sequence[Sequence[float]]) -> None:
        if not rows:  # sent with another collective, which has called this function already
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
                    f"{int(columns[_STEPS][0]) + 1} the number of backwards is {counts}. step() or backward() depends "
                    "on a condition that differs between ranks: compute it from the result of lite.all_reduce()."
                )
        for name, column in zip(self._names, columns[_HASH + 1 :], strict=False):
            if len(set(map(repr, column))) > 1:
                raise OutOfSyncError(
                    f"{name} of {optimizer} differs between the ranks: {_by_rank(column)}. If a scheduler depends on a "
                    "loss, such as ReduceLROnPlateau, pass it the loss of all ranks: "
                    "scheduler.step(lite.all_reduce(loss))."
                )
        raise OutOfSyncError(
            f"The settings of {optimizer} differ between the ranks in a parameter group (learning rate, momentum, …): "
            "use the same settings on every rank, and pass schedulers the loss of all ranks, lite.all_reduce(loss)."
        )


#: Types compared unchanged. A look-up is fast: this runs for every key of every group at every step.
_PLAIN = frozenset((int, float, bool, tuple))


def _add_values(group: dict[str, Any], values: list[Any]) -> None:
    """Append the compared values of a group: plain numbers, tuples of them, and tensors on the CPU."""
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


def _named_values(number: int, group: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """Yield the names and numbers of a group, the learning rate first."""
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
