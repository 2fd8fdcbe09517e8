"""Compare optimizer settings over ranks with a few numbers in a gradient bucket."""

from __future__ import annotations

import weakref
import zlib
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import OutOfSyncError

#: Slots in the bucket: the bytes of a checksum, and their squares.
SLOTS = 8
#: Up to this number of ranks a sum of squared bytes is exact in float32.
MOST_RANKS = 256

Look = Callable[[Sequence[Sequence[float]]], None]


class SettingsDigest:
    """Send a checksum of all settings with the gradients; ranks whose checksums differ gather the settings.

    For equal bytes b on n ranks, n * sum(b * b) == sum(b) ** 2, and for unequal ones not
    (Cauchy-Schwarz). So the all-reduce (sum) of the gradients is enough to detect a difference.

    Args:
        num_ranks: size of the group, at most `MOST_RANKS`.
        gather: returns the objects of all ranks.
    """

    def __init__(self, num_ranks: int, gather: Callable[..., Sequence[Any]]) -> None:
        self._num_ranks = num_ranks
        self._gather = gather
        self._checksum = 0
        # Keyed by the object that owns the callback, in the order of first steps.
        self._rows: weakref.WeakKeyDictionary[Any, tuple[Sequence[float], Any]] = weakref.WeakKeyDictionary()
        self._differs = False
        # Written in memory shared with a tensor: creating a tensor from numbers is slower than all the rest.
        self._slots = array("d", [0.0] * SLOTS)
        self._shared = torch.frombuffer(self._slots, dtype=torch.float64)

    def note(self, values: Sequence[float], look: Look) -> None:
        """Record the settings of an optimizer's step.

        Args:
            look: method that receives the settings of all ranks if they differ, and raises.
        """
        method: Any = look
        self._rows[method.__self__] = values, method.__func__
        self._checksum = checksum = zlib.crc32(array("d", values).tobytes(), self._checksum)
        self._write(checksum)

    def _write(self, checksum: int) -> None:
        slots, half = self._slots, SLOTS // 2
        for index, byte in enumerate(checksum.to_bytes(half, "little")):
            slots[index] = byte
            slots[half + index] = byte * byte

    def put(self, slots: Tensor) -> None:
        """Write the checksum into a bucket: shape (`SLOTS`,), float32 or float64, on the CPU."""
        slots.copy_(self._shared)

    def read(self, slots: Tensor) -> None:
        """Check the sums over ranks."""
        sums: list[float] = slots.tolist()
        half = SLOTS // 2
        for i in range(half):
            if self._num_ranks * sums[half + i] != sums[i] * sums[i]:
                self._differs = True

    def settle(self) -> None:
        """If the checksums differ, compare the settings of all ranks. Every rank must call it.

        Raises:
            OutOfSyncError: on all ranks, from a callback or in general.
        """
        if not self._differs:
            return
        self._differs = False
        rows, self._rows = list(self._rows.items()), weakref.WeakKeyDictionary()
        self._checksum = 0
        self._write(0)
        everyone = self._gather(obj=[list(values) for _, (values, _) in rows], group=None)
        if len(set(map(len, everyone))) == 1:
            for number, (owner, (_, look)) in enumerate(rows):
                look(owner, [rank_rows[number] for rank_rows in everyone])
        counts = ", ".join(f"{len(each)} on rank {rank}" for rank, each in enumerate(everyone))
        raise OutOfSyncError(
            f"The ranks do not make the same steps of their optimizers, in one order (optimizers that have stepped: "
            f"{counts}). A condition that holds on some ranks decides about step(): decide by what lite.all_reduce() "
            "gives."
        )
