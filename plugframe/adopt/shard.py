"""Which samples of each global batch a rank reads, and how much they weigh.

A *window* is what all ranks together read in one step: the batch one process would read that had the whole
batch size. A rank's batch of n out of the window's N samples weighs ``n * ranks / N``: multiplied with a loss
that is a mean over the rank's batch, the mean over ranks is the mean over the window. It is 1 but for the
last window of an epoch.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import BatchSampler, IterableDataset

from plugframe.adopt.order import Draws

Share = tuple[Any, float]


def share_indices(
    take: Callable[[int], list[Any]], *, size: int, drop_last: bool, index: int, count: int, even: bool
) -> Iterator[Share]:
    """Yield this rank's (batch, weight) for every window of ``size * count`` indices.

    Args:
        take: returns the next n indices of the epoch, fewer at its end.
        size: indices in a rank's batch.
        drop_last: leave out a window that is not full.
        index: of this rank.
        count: of ranks.
        even: give every rank a batch in every window, if need be one that weighs 0; otherwise every index is
            read exactly once, and the numbers of batches are still equal where that is possible.
    """
    held: list[Any] = []
    while len(window := take(size * count)) == size * count:
        if held:
            yield held, 1.0
        held = window[index::count]
    if window and not drop_last:
        mine = window[index::count]
        if not mine and even:
            mine, weight = window[:size], 0.0
        else:
            weight = len(mine) * count / len(window)
        if not mine and len(held) > 1:
            # Fewer samples than ranks are left. A batch of this rank in two keeps the ranks in step.
            held, mine, weight = held[:-1], held[-1:], 1.0
        yield from (share for share in ((held, 1.0), (mine, weight)) if share[0])
    elif held:
        yield held, 1.0


def share_batches(take: Callable[[int], list[Any]], *, index: int, count: int, even: bool) -> Iterator[Share]:
    """Yield this rank's (batch, weight) for every window of `count` whole batches, of a sampler of the user's own."""
    while window := take(count):
        sizes = [len(b) if isinstance(b, (list, tuple)) else 1 for b in window]
        if index < len(window):
            yield window[index], sizes[index] * count / max(sum(sizes), 1)
        elif even:
            yield window[0], 0.0


class ShardedIndices:
    """Stands in for a loader's sampler: yields this rank's share and remembers the weights, in order.

    Everything else is asked of the user's own sampler.
    """

    def __init__(self, inner: Any, *, index: int, count: int, start: Callable[[], tuple[Draws | None, bool]]) -> None:
        self._inner = inner
        self._index = index
        self._count = count
        self._start = start
        self.weights: deque[float] = deque()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_inner"], name)

    def __iter__(self) -> Iterator[Any]:
        draws, even = self._start()
        weights: deque[float] = deque()
        self.weights = weights
        flat = self._flat()
        take = _taker(iter(self._inner.sampler if flat else self._inner), draws)
        if flat:
            size, drop_last = self._inner.batch_size, self._inner.drop_last
            shares = share_indices(
                take, size=size, drop_last=drop_last, index=self._index, count=self._count, even=even
            )
        else:
            shares = share_batches(take, index=self._index, count=self._count, even=even)
        for batch, weight in shares:
            weights.append(weight)
            yield batch

    def _flat(self) -> bool:
        # Only torch's own BatchSampler is known to cut its sampler's indices into equal pieces.
        return type(self._inner) is BatchSampler

    def length(self, even: bool) -> int:
        """Return how many batches this rank reads in an epoch."""
        if not self._flat():
            full, rest = _whole(len(self._inner), self._count)
            return full + (rest > 0 if even else self._index < rest)
        size = self._inner.batch_size
        full, rest = _whole(len(self._inner.sampler), size * self._count)
        if self._inner.drop_last or not rest:
            return full
        reads = even or self._index < rest or (full > 0 and size > 1)
        return full + int(reads)

    def __len__(self) -> int:
        return self.length(even=True)


def _whole(number: int, size: int) -> tuple[int, int]:
    return number // size, number % size


def _taker(iterator: Iterator[Any], draws: Draws | None) -> Callable[[int], list[Any]]:
    def take(number: int) -> list[Any]:
        if draws is None:
            return list(itertools.islice(iterator, number))
        with draws.drawing():
            return list(itertools.islice(iterator, number))

    return take


class ShardedIterable(IterableDataset[Any]):
    """Stands in for an iterable dataset: yields this rank's share of every window, as (item, weight) if weighed.

    It is pickled into worker processes. Attributes are those of the user's dataset, read and written.
    """

    _own = ("_inner", "_size", "_drop_last", "_index", "_count", "_weighed", "_even")

    def __init__(self, inner: Any, *, size: int, drop_last: bool, index: int, count: int, weighed: bool) -> None:
        values = (inner, size, drop_last, index, count, weighed, False)
        for name, value in zip(self._own, values, strict=True):
            object.__setattr__(self, name, value)

    def __getattr__(self, name: str) -> Any:
        if name in ShardedIterable._own:
            raise AttributeError(name)  # while it is being unpickled
        return getattr(self._inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        target = self if name in self._own else self._inner
        object.__setattr__(self, name, value) if target is self else setattr(target, name, value)

    def __iter__(self) -> Iterator[Any]:
        iterator = iter(self._inner)
        shares = share_indices(
            lambda number: list(itertools.islice(iterator, number)),
            size=self._size,
            drop_last=self._drop_last,
            index=self._index,
            count=self._count,
            even=self._even,
        )
        for batch, weight in shares:
            for item in batch:
                yield (item, weight) if self._weighed else item


class WeighedCollate:
    """Collates the items of (item, weight) pairs and hands the weight on. It is pickled into worker processes."""

    def __init__(self, inner: Callable[[Any], Any], *, batched: bool) -> None:
        self.inner = inner
        self.batched = batched

    def __call__(self, data: Any) -> tuple[Any, float]:
        if not self.batched:
            item, weight = data
            return self.inner(item), weight
        return self.inner([item for item, _ in data]), data[0][1]
