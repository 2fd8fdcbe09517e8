"""Random numbers of a batch that a worker process makes: those of that batch, whichever worker makes it and when."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, get_worker_info

from plugframe.data.generators import Held, held_sources, reseed
from plugframe.utils.proxy import StandIn, rebuilt

#: Gives the seed of a batch by its number in the epoch.
Seeds = Callable[[int], int]


class SeededIndices(NamedTuple):
    """What a worker is to read, and the seed of everything it draws for it."""

    indices: Any
    seed: int


class SeededDataset(StandIn, Dataset[Any]):
    """Stands in for a map-style dataset in worker processes: seeds their generators anew for each batch.

    A worker's generators would otherwise go on from batch to batch, so that a batch could be made again only
    after all that the same worker made before it. The generators that the dataset or the ``collate_fn`` holds are
    seeded too: a worker has a copy of them, equal in every worker, epoch and rank.

    Args:
        collate: the loader's ``collate_fn``.
        salts: of the generators that were held when the loader was set up; see `plugframe.data.generators`.
    """

    _own = ("_inner", "_collate", "_salts", "_held", "_looks")

    def __init__(self, inner: Any, collate: Any, salts: Mapping[str, int]) -> None:
        self._inner = inner
        self._collate = collate
        self._salts = salts
        self._held: Held = {}
        self._looks = 0

    def __getitem__(self, index: Any) -> Any:
        return self._inner[self._seeded(index)]

    def __getitems__(self, index: Any) -> Any:
        indices = self._seeded(index)
        many = getattr(self._inner, "__getitems__", None)
        return many(indices) if many else [self._inner[each] for each in indices]

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt(self)

    def _seeded(self, index: Any) -> Any:
        if type(index) is not SeededIndices:
            return index  # read by the user's own code
        seed_here(index.seed)
        if self._looks < _LOOKS:  # a dataset may make its generator when it is first read
            self._looks += 1
            self._held = held_sources(dataset=self._inner, collate_fn=self._collate)
        reseed(self._held, self._salts, index.seed)
        return index.indices


#: In how many batches a worker looks for generators that were made meanwhile.
_LOOKS = 4


def seed_here(seed: int) -> None:
    """Seed the generators of this worker process, and the seed it reports."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy:
        numpy.seed(seed % 2**32)
    tell_seed(seed)


def tell_seed(seed: int) -> None:
    """Have ``get_worker_info().seed`` be `seed`: scripts make generators from it."""
    info = get_worker_info()
    if info is not None:
        # Its attributes are read-only for scripts, not for what starts the worker.
        object.__setattr__(info, "seed", seed)
