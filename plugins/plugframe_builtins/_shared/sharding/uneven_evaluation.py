"""Evaluating together: a rank that has no batch left helps those that have.

A forward of a sharded model gathers parts from all ranks, so all ranks must run it equally often, while each
sample is evaluated exactly once and some rank may have one batch less. Before each forward of an evaluation the
ranks tell each other what they are about to do; those at the end of their loader gather along.
"""

from __future__ import annotations

import itertools
import weakref
import zlib
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from plugframe.errors import CollectiveMismatchError

#: What a rank says that has come to the end of its loader.
_DONE = -1


class Member(Protocol):
    """A model whose forward needs all ranks."""

    def help(self) -> None:
        """Gather what a forward on another rank gathers."""
        ...

    def order(self) -> Sequence[int]:
        """Return in which order the last forward, or the last help, gathered the model's parts."""
        ...


class Company:
    """What the ranks tell each other.

    Args:
        hooks: the job's hooks.
        num_ranks: of the job.
    """

    def __init__(self, hooks: Any, num_ranks: int) -> None:
        self._hooks = hooks
        self._num_ranks = num_ranks
        # Weakly: a model that its user has let go goes, with all that shards it.
        self._models: weakref.WeakValueDictionary[int, Member] = weakref.WeakValueDictionary()
        self._numbers = itertools.count()
        self._last: Member | None = None

    def join(self, model: Member) -> int:
        """Take a model in; return its number for `announce`."""
        number = next(self._numbers)
        self._models[number] = model
        return number

    def announce(self, number: int) -> None:
        """Say that a forward of that model comes. Every rank must call it, or be in `keep`."""
        if self._num_ranks > 1:
            self._tell(number)
            self._last = self._models[number]

    def checksum(self) -> int:
        """Return a checksum of the order in which the last forward of an evaluation gathered; forget it.

        The ranks compare it where they meet next.
        """
        last, self._last = self._last, None
        return 0 if last is None else zlib.crc32(repr(last.order()).encode())

    def keep(self) -> None:
        """Help until every rank is here. Every rank calls it at the end of its loader while it evaluates."""
        while self._num_ranks > 1:
            wanted = max(self._tell(_DONE))
            if wanted == _DONE:
                return
            self._last = self._models.get(wanted)
            if self._last is None:
                raise CollectiveMismatchError(
                    f"Other ranks evaluate a model (the {wanted + 1}. that was set up) that this rank has let go: keep "
                    "it on all ranks until the evaluation has ended."
                )
            self._last.help()

    def _tell(self, number: int) -> list[int]:
        order = zlib.crc32(repr(self._last.order()).encode()) if self._last else 0
        said = self._hooks.collective_all_gather(tensor=torch.tensor([number, order]), group=None, sync_grads=False)
        if len(said[:, 1].unique()) > 1:
            # What a rank gathered in another order it took for something else: nothing of it may be believed.
            raise CollectiveMismatchError(
                "The ranks that evaluated gathered the parts of the model in another order than a rank that had no "
                "batch assumed: run one forward on every rank before, or evaluate as many batches as there are ranks."
            )
        return said[:, 0].tolist()  # type: ignore[no-any-return]
