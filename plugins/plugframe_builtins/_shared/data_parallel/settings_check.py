"""Settings of optimizers, compared over ranks by a few numbers that ride along in a bucket of gradients."""

from __future__ import annotations

import weakref
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import OutOfSyncError

#: Numbers in the bucket: the bytes of a checksum, and their squares.
SLOTS = 8
#: Up to so many ranks a sum of squares of bytes is exact in float32.
MOST_RANKS = 256

Look = Callable[[Sequence[Sequence[float]]], None]


class SettingsCheck:
    """Sends a checksum of all settings so far with the gradients, and has ranks that differ tell each other theirs.

    Of equal bytes b on n ranks the sums fulfil n * sum(b * b) == sum(b) ** 2, and of unequal ones they do not
    (Cauchy-Schwarz). So an all-reduce by sum, which the gradients take anyway, is enough to find a difference.

    Args:
        num_ranks: of the group, at most `MOST_RANKS`.
        gather: returns an object of every rank.
    """

    def __init__(self, num_ranks: int, gather: Callable[..., Sequence[Any]]) -> None:
        self._num_ranks = num_ranks
        self._gather = gather
        self._checksum = 0
        self._rows: dict[int, tuple[Sequence[float], weakref.WeakMethod[Look]]] = {}
        self._differs = False
        self._slots = [0.0] * SLOTS

    def note(self, values: Sequence[float], look: Look) -> None:
        """Take in the numbers of an optimizer's step.

        Args:
            look: a method that is called with the numbers of all ranks if they differ, and raises.
        """
        owner: Any = look
        if id(owner.__self__) not in self._rows:  # another optimizer: those that have gone are forgotten
            self._rows = {key: row for key, row in self._rows.items() if row[1]() is not None}
        self._rows[id(owner.__self__)] = values, weakref.WeakMethod(look)
        self._checksum = zlib.crc32(array("d", values).tobytes(), self._checksum)
        digits = [float(byte) for byte in self._checksum.to_bytes(4, "little")]
        self._slots = [*digits, *(digit * digit for digit in digits)]

    def put(self, slots: Tensor) -> None:
        """Write the checksum into a bucket: shape (`SLOTS`,), float32 or float64, on the CPU."""
        slots.copy_(torch.tensor(self._slots, dtype=slots.dtype))

    def read(self, slots: Tensor) -> None:
        """Look at the sums over ranks of what they have put."""
        sums: list[float] = slots.tolist()
        half = SLOTS // 2
        self._differs |= any(self._num_ranks * sums[half + i] != sums[i] * sums[i] for i in range(half))

    def settle(self) -> None:
        """If the checksums differed, have every rank look at the numbers of all. Every rank must call it.

        Raises:
            OutOfSyncError: on all ranks, by one of those that look or in general.
        """
        if not self._differs:
            return
        self._differs = False
        rows, self._rows = self._rows, {}
        self._checksum, self._slots = 0, [0.0] * SLOTS
        everyone = self._gather(obj=[list(values) for values, _ in rows.values()], group=None)
        if len(set(map(len, everyone))) == 1:
            for number, (_, reference) in enumerate(rows.values()):
                look = reference()
                if look is not None:
                    look([rank_rows[number] for rank_rows in everyone])
        counts = ", ".join(f"{len(each)} on rank {rank}" for rank, each in enumerate(everyone))
        raise OutOfSyncError(
            f"The ranks do not make the same steps of their optimizers, in one order (optimizers that have stepped: "
            f"{counts}). A condition that holds on some ranks decides about step(): decide by what lite.all_reduce() "
            "gives."
        )
