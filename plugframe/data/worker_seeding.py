"""Seed worker processes per batch: the random numbers of a batch do not depend on which worker makes it, and when."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import Dataset, get_worker_info

from plugframe.data.generators import Generators, find_generators, reseed
from plugframe.utils.proxy import StandIn, rebuilt

#: Returns the seed of a batch by its number in the epoch.
BatchSeeds = Callable[[int], int]

#: How many batches a worker searches for generators that were made after set-up.
_MAX_SEARCHES = 4


class SeededIndices(NamedTuple):
    """The indices of a batch, and the seed for everything that is drawn to make it."""

    indices: Any
    seed: int


class SeededDataset(StandIn, Dataset[Any]):
    """Proxy of a map-style dataset in worker processes that seeds their generators for each batch.

    Otherwise a worker's generators go on from batch to batch, and a batch could be made again only after all earlier
    batches of the same worker. Generators that the dataset or the ``collate_fn`` hold are seeded too: their copies
    are equal in every worker, epoch and rank.

    Args:
        collate: the loader's ``collate_fn``.
        salts: hashes of the generators at set-up; see `plugframe.data.generators.salts`.
    """

    _own = ("_inner", "_collate", "_salts", "_generators", "_num_searches")

    def __init__(self, inner: Any, collate: Any, salts: Mapping[str, int]) -> None:
        self._inner = inner
        self._collate = collate
        self._salts = salts
        self._generators: Generators = {}
        self._num_searches = 0

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
        seed_worker(index.seed)
        if self._num_searches < _MAX_SEARCHES:  # a dataset may make its generator when it is first read
            self._num_searches += 1
            self._generators = find_generators(dataset=self._inner, collate_fn=self._collate)
        reseed(self._generators, self._salts, index.seed)
        return index.indices


def seed_worker(seed: int) -> None:
    """Seed the generators of this worker process, and set ``get_worker_info().seed``."""
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    numpy = sys.modules.get("numpy.random")
    if numpy:
        numpy.seed(seed % 2**32)
    set_worker_info_seed(seed)


def set_worker_info_seed(seed: int) -> None:
    """Set ``get_worker_info().seed``, from which scripts make generators."""
    info = get_worker_info()
    if info is not None:
        object.__setattr__(info, "seed", seed)  # a hack: WorkerInfo refuses assignment
