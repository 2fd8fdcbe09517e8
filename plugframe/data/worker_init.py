"""Seed worker processes by rank, before the user's own ``worker_init_fn``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch.utils.data import get_worker_info

from plugframe.data.generators import find_generators, reseed
from plugframe.data.sharded_iterable import ShardedIterable, SizedShardedIterable
from plugframe.data.worker_seeding import seed_worker, set_worker_info_seed


class RankWorkerInit:
    """A ``worker_init_fn`` that seeds by rank too: with equal seeds all ranks would augment in the same way.

    A stream that is divided here gets the same seed on all ranks, since it may shuffle by it.

    Args:
        inner: the user's ``worker_init_fn``.
        rank: data shard of this rank.
        collate: the loader's ``collate_fn``.
        salts: hashes of the generators of the dataset and `collate`; see `plugframe.data.generators.salts`.
    """

    def __init__(
        self,
        inner: Callable[[int], None] | None,
        rank: int,
        collate: Any = None,
        salts: Mapping[str, int] | None = None,
    ) -> None:
        self.inner = inner
        self.rank = rank
        self.collate = collate
        self.salts = salts or {}

    def __call__(self, worker: int) -> None:
        info = get_worker_info()
        base = info.seed if info else torch.initial_seed()
        seed = (base + self.rank * 0x9E3779B97F4A7C15) % 2**63
        if self.rank:
            seed_worker(seed)
        dataset = info.dataset if info else None
        if type(dataset) in (ShardedIterable, SizedShardedIterable):
            set_worker_info_seed(cast("ShardedIterable", dataset).seed_of_worker(worker))
        elif dataset is not None:
            reseed(find_generators(dataset=dataset, collate_fn=self.collate), self.salts, seed)
        if self.inner is not None:
            self.inner(worker)
