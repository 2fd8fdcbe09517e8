"""Random numbers of a batch that a worker process makes: those of that batch, whichever worker makes it and when."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset

from plugframe.adopt.standin import StandIn, rebuilt

#: Gives the seed of a batch by its number in the epoch.
Seeds = Callable[[int], int]


class SeededIndices(NamedTuple):
    """What a worker is to read, and the seed of everything it draws for it."""

    indices: Any
    seed: int


class SeededDataset(StandIn, Dataset[Any]):
    """Stands in for a map-style dataset in worker processes: seeds their generators anew for each batch.

    A worker's generators would otherwise go on from batch to batch, so that a batch could be made again only
    after all that the same worker made before it.
    """

    _own = ("_inner",)

    def __init__(self, inner: Any) -> None:
        self._inner = inner

    def __getitem__(self, index: Any) -> Any:
        return self._inner[_seeded(index)]

    def __getitems__(self, index: Any) -> Any:
        indices = _seeded(index)
        many = getattr(self._inner, "__getitems__", None)
        return many(indices) if many else [self._inner[each] for each in indices]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt(self)


def _seeded(index: Any) -> Any:
    if type(index) is not SeededIndices:
        return index  # read by the user's own code
    torch.default_generator.manual_seed(index.seed)
    random.seed(index.seed)
    numpy = sys.modules.get("numpy.random")
    if numpy:
        numpy.seed(index.seed % 2**32)
    return index.indices
