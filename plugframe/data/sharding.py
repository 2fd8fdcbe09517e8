"""Divide the samples of each global batch between ranks, and compute the weights of their batches.

A *window* is the global batch: the samples that all ranks together read in one step. A rank's batch of n out of the
window's N samples has the weight ``n * ranks / N``: multiplied with a loss that is a mean over the rank's batch, the
mean over ranks is the mean over the window. It is 1 except in the last window of an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch.utils.data import BatchSampler

from plugframe.data.shuffle import RandomStream
from plugframe.data.worker_seeding import BatchSeeds, SeededIndices
from plugframe.utils.proxy import StandIn

#: The position of samples that have none in the order of one process.
UNKNOWN = -1


class Share(NamedTuple):
    """What a rank's batch is of its window.

    Attributes:
        weight: relative to the batches of the other ranks; 0 for a batch that repeats samples of another rank.
        start: position of its first sample in the epoch, in the order of one process; `UNKNOWN` if there is none.
        step: distance between the positions of its samples.
        size: number of its samples.
        partial: whether there are ranks that got no sample of the window.
    """

    weight: float = 1.0
    start: int = 0
    step: int = 1
    size: int = 1
    partial: bool = False


def share_indices(
    take: Callable[[int], list[Any]],
    *,
    size: int,
    drop_last: bool,
    index: int,
    count: int,
    even: bool,
    halve: bool = True,
    pad: Callable[[], bool] = bool,
    trains: Callable[[], bool] = bool,
) -> Iterator[tuple[Any, Share]]:
    """Yield this rank's batch and its share for every window of ``size * count`` indices.

    Args:
        take: returns the next n indices of the epoch, fewer at its end.
        size: indices in a rank's batch.
        drop_last: leave out a window that is not full.
        index: data shard of this rank.
        count: number of data shards.
        even: give every rank a batch in every window, if necessary one of weight 0 that repeats samples. If False,
            every index is read exactly once; ranks get equal numbers of batches where that is possible.
        halve: whether a rank that would be one batch short may split its last batch. A stream cannot: torch makes
            batches of a fixed size, and only the last may be shorter.
        pad: returns at the end whether a rank without samples of the last window gets a batch of weight 0 in any case,
            which its reader may leave out.
        trains: returns at the end whether the pass has turned out to need `even`.
    """
    pending: list[Any] = []
    start = index
    # Only evaluations on several ranks may need the last full batch again; nothing else is read ahead, since a sampler
    # or a stream may depend on what the training did with the batch before.
    ahead = halve and count > 1 and not even

    def share(batch: list[Any], weight: float = 1.0, *, partial: bool = False) -> tuple[Any, Share]:
        nonlocal start
        begin, start = start, start + len(batch) * count
        return batch, Share(weight, begin, count, len(batch), partial)

    while len(window := take(size * count)) == size * count:
        if not ahead:
            yield share(window[index::count])
            continue
        if pending:
            yield share(pending)
        pending = window[index::count]
    mine = window[index::count] if not drop_last else []
    weight = len(mine) * count / max(len(window), 1)
    partial = len(window) < count and (even or not halve or len(pending) < 2)
    if window and not drop_last and not mine:
        if even or trains() or (len(pending) < 2 and pad()):
            mine = window[:size]
        elif len(pending) > 1:
            # Fewer samples than ranks are left: splitting a batch of this rank keeps the numbers of batches equal.
            pending, mine, weight = pending[:-1], pending[-1:], 1.0
    if pending:
        yield share(pending)
    if mine:
        yield share(mine, weight, partial=partial)


def share_batches(
    take: Callable[[int], list[Any]],
    *,
    index: int,
    count: int,
    even: bool,
    pad: Callable[[], bool] = bool,
    trains: Callable[[], bool] = bool,
    size: Callable[[Any], int] | None = None,
) -> Iterator[tuple[Any, Share]]:
    """Yield this rank's batch and its share for every window of `count` complete batches of a custom sampler.

    Args:
        size: returns the number of samples in a batch; by default that of its indices.
    """
    start = 0
    while window := take(count):
        sizes = [(size or _size)(batch) for batch in window]
        partial = len(window) < count
        if index < len(window):
            weight = sizes[index] * count / max(sum(sizes), 1)
            yield window[index], Share(weight, start + sum(sizes[:index]), 1, sizes[index], partial)
        elif even or pad() or trains():
            yield window[0], Share(0.0, start, 1, sizes[0], partial)
        start += sum(sizes)


def num_batches(
    number: int, *, size: int, drop_last: bool, index: int, count: int, even: bool, halve: bool = True
) -> int:
    """Return the number of batches that `share_indices` yields for `number` indices."""
    full, rest = divmod(number, size * count)
    if drop_last or not rest:
        return full
    return full + (even or index < rest or (halve and full > 0 and size > 1))


def _size(batch: Any) -> int:
    """Return the number of samples in an element of a batch sampler: a key, such as a string, or several keys."""
    if isinstance(batch, (str, bytes)) or not hasattr(batch, "__len__") or getattr(batch, "ndim", 1) == 0:
        return 1
    return len(batch)


class PassStart(NamedTuple):
    """Settings of a pass over indices.

    Attributes:
        random_stream: random numbers for the sampler; None if it needs none.
        even: whether every rank gets a batch in every window.
        add_share: called with the share of every batch, in order.
        skip: number of batches to leave out, which were read before this process started.
        seeds: returns the seed of each batch, if worker processes make it.
        trains: returns at the end whether every rank needs a batch in every window.
        pad: returns at the end whether a rank gets a batch in the last window in any case; see `share_indices`.
        origin: number of indices (or batches, of a batch sampler) that all ranks read before; shares begin after them.
        first: number of the first batch after `origin`.
    """

    random_stream: RandomStream | None
    even: bool
    add_share: Callable[[Share], object]
    skip: int
    seeds: BatchSeeds | None = None
    trains: Callable[[], bool] = bool
    pad: Callable[[], bool] = bool
    origin: int = 0
    first: int = 0


class ShardedIndices(StandIn):
    """Proxy of a loader's sampler that yields this rank's share."""

    _own = ("_inner", "_index", "_count", "_begin", "_even")

    def __init__(
        self,
        inner: Any,
        *,
        index: int,
        count: int,
        begin: Callable[[], Callable[[], PassStart]],
        even: Callable[[], bool],
    ) -> None:
        self._inner = inner
        self._index = index
        self._count = count
        self._begin = begin
        self._even = even

    def __iter__(self) -> Iterator[Any]:
        # Called here and not at the first index: two passes may be open at once.
        return self._share(self._begin())

    def _share(self, begun: Callable[[], PassStart]) -> Iterator[Any]:
        # Called at the first index: with worker processes torch makes two iterators, and uses the second.
        start = begun()
        # One rank reads the user's sampler unchanged; every batch weighs 1.
        alone = self._count == 1 and not start.origin
        drawn = _drawn(self._inner, start.random_stream) if alone else None
        batches = self._shares(start) if drawn is None else itertools.islice(drawn, start.skip, None)
        if start.seeds is None:
            yield from batches
        else:
            yield from map(SeededIndices, batches, map(start.seeds, itertools.count(start.first + start.skip)))

    def _shares(self, start: PassStart) -> Iterator[Any]:
        flat = is_flat(self._inner)
        take = make_take(self._inner.sampler if flat else self._inner, start.random_stream)
        if start.origin:
            take(start.origin)
        if flat:
            size, drop_last = self._inner.batch_size, self._inner.drop_last
            shares = share_indices(
                take,
                size=size,
                drop_last=drop_last,
                index=self._index,
                count=self._count,
                even=start.even,
                pad=start.pad,
                trains=start.trains,
            )
        else:
            shares = share_batches(
                take, index=self._index, count=self._count, even=start.even, pad=start.pad, trains=start.trains
            )
        for batch, share in itertools.islice(shares, start.skip, None):
            start.add_share(share)
            yield batch

    def __len__(self) -> int:
        even = self._even()
        if not is_flat(self._inner):
            full, rest = divmod(len(self._inner), self._count)
            return full + (rest > 0 if even else self._index < rest)
        size, drop_last = self._inner.batch_size, self._inner.drop_last
        return num_batches(
            len(self._inner.sampler), size=size, drop_last=drop_last, index=self._index, count=self._count, even=even
        )


def is_flat(batches: Any) -> bool:
    """Return whether a batch sampler divides the indices of a sampler into equal batches, as torch's class does."""
    return type(batches) is BatchSampler


def dropped_text(batches: Any, count: int) -> str:
    """Return an error message, if ``drop_last`` leaves out samples that one process would read; else an empty one."""
    try:
        number = len(batches.sampler)
    except TypeError:
        return ""
    left, alone = number % (batches.batch_size * count), number % batches.batch_size
    if left == alone:
        return ""
    return (
        f"DataLoader(drop_last=True) leaves out {left} of {number} samples on {count} ranks, and {alone} on one: "
        "evaluate with drop_last=False."
    )


def _drawn(source: Any, random_stream: RandomStream | None) -> Iterator[Any]:
    """Return an iterator over `source` that draws from `random_stream`; where possible at the cost of a plain one."""
    if random_stream is None:
        return iter(source)
    iterator = _iterate(source)

    def take() -> list[Any]:
        with random_stream.active():
            return list(itertools.islice(iterator, 1))

    if random_stream.every:
        return itertools.chain.from_iterable(iter(take, []))
    return itertools.chain(take(), iterator)


def make_take(source: Any, random_stream: RandomStream | None) -> Callable[[int], list[Any]]:
    """Return a function that returns the next n items of `source`, drawn from `random_stream`."""
    iterator = _iterate(source)

    def take(number: int) -> list[Any]:
        if random_stream is None:
            return list(itertools.islice(iterator, number))
        with random_stream.active():
            return list(itertools.islice(iterator, number))

    return take


def _iterate(source: Any) -> Iterator[Any]:
    yield from source  # a generator: `iter(source)` may draw random numbers, and runs with the first item only
