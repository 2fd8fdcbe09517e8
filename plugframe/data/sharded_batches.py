"""Divide an iterable of complete batches between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

from plugframe.data.sharded_iterable import ShardedIterable, SizedShardedIterable
from plugframe.data.sharding import Share, share_batches
from plugframe.utils.tree import leaves


class ShardedBatches(ShardedIterable):
    """`ShardedIterable` whose items are batches, weighted by their numbers of samples."""

    _own = ShardedIterable._own

    def _windows(self, take: Callable[[int], list[Any]], even: bool) -> Iterator[tuple[Any, Share]]:
        for batch, share in share_batches(
            take,
            index=self._index,
            count=self._count,
            even=even,
            pad=lambda: self._weighted,
            trains=lambda: bool(self._shared[1]),
            size=num_samples,
        ):
            yield [batch], share


class SizedShardedBatches(ShardedBatches, SizedShardedIterable):
    """`ShardedBatches` of an iterable with a length."""

    _own = ShardedIterable._own


def num_samples(batch: Any) -> int:
    """Return the number of samples in a batch: the first dimension of its first tensor or array, else 1.

    Of a batch of columns without tensors it is the length of the first column.
    """
    for leaf in leaves(batch):
        if isinstance(leaf, Tensor) or hasattr(leaf, "__array_interface__"):
            return int(leaf.shape[0]) if leaf.ndim else 1
    first = next(iter(batch.values()), None) if isinstance(batch, Mapping) else None
    return len(first) if isinstance(first, (list, tuple)) else 1
