"""Uneven evaluation: a rank without batches takes part in the collectives of ranks with batches.

A forward of a sharded model gathers parameters from all ranks, so all ranks must run it equally often, while each
sample is evaluated exactly once and some ranks may have one batch less. Before each forward of an evaluation the
ranks announce their next action; those at the end of their loader join the gathers.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from plugframe.errors import CollectiveMismatchError

#: Announcement of a rank at the end of its loader.
_DONE = -1


class Member(Protocol):
    """A model with a forward that needs all ranks."""

    def help(self) -> None:
        """Gather the parameters that a forward on another rank gathers."""
        ...

    def order(self) -> Sequence[int]:
        """Return the order of units in the last forward, or the last `help`."""
        ...


class UnevenEvaluation:
    """Coordinate evaluation over ranks with uneven numbers of batches.

    Args:
        hooks: the session's hooks.
        num_ranks: number of ranks.
    """

    def __init__(self, hooks: Any, num_ranks: int) -> None:
        self._hooks = hooks
        self._num_ranks = num_ranks
        # Weak references: models are collected with their shards.
        self._models: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._last: Member | None = None

    def join(self, model: Member) -> int:
        """Add a model; return its number for `announce`."""
        number = next(self._numbers)
        self._models[number] = model
        return number

    def announce(self, number: int) -> None:
        """Announce a forward of that model. Every rank must call it, or be in `keep`."""
        if self._num_ranks > 1:
            self._exchange(number)
            self._last = self._models[number]

    def checksum(self) -> int:
        """Return a checksum of the unit orders in the last evaluation, and reset it.

        The ranks compare it at their next exchange.
        """
        last, self._last = self._last, None
        return 0 if last is None else zlib.crc32(repr(last.order()).encode())

    def keep(self) -> None:
        """Join other ranks' forwards until all are done. Every rank calls it at the end of its evaluation loader."""
        while self._num_ranks > 1:
            wanted = max(self._exchange(_DONE))
            if wanted == _DONE:
                return
            self._last = self._models.get(wanted)
            if self._last is None:
                raise CollectiveMismatchError(
                    f"Other ranks evaluate a model (the {wanted + 1}. set up) that this rank has deleted: keep "
                    "it on all ranks until the evaluation has ended."
                )
            self._last.help()

    def _exchange(self, number: int) -> list[int]:
        order = zlib.crc32(repr(self._last.order()).encode()) if self._last else 0
        said = self._hooks.collective_all_gather(tensor=torch.tensor([number, order]), group=None, sync_grads=False)
        if len(said[:, 1].unique()) > 1:
            # Units gathered in different orders are mixed up: no result is valid.
            raise CollectiveMismatchError(
                "The ranks that evaluated gathered the submodules in another order than a rank that had no "
                "batch assumed: run one forward on every rank before, or evaluate as many batches as there are ranks."
            )
        return said[:, 0].tolist()  # type: ignore[no-any-return]
