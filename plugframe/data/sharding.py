"""Divide the samples of each global batch between ranks, and compute the weights of their batches.

A *window* is the global batch: the samples that all ranks together read in one step. A rank's batch of n out of the
window's N samples has the weight ``n * ranks / N``: multiplied with a loss that is a mean over the rank's batch, the
mean over ranks is the mean over the window. It is 1 except in the last window of an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, IterableDataset, get_worker_info

from plugframe.data.shuffle import RandomStream, Shuffle
from plugframe.data.stateful import is_stateful
from plugframe.data.stream_check import window_digest
from plugframe.data.worker_seeding import BatchSeeds, SeededIndices
from plugframe.utils.proxy import StandIn, rebuilt

Share = tuple[Any, float]


def share_indices(
    take: Callable[[int], list[Any]],
    *,
    size: int,
    drop_last: bool,
    index: int,
    count: int,
    even: bool,
    halve: bool = True,
    trains: Callable[[], bool] = bool,
) -> Iterator[Share]:
    """Yield this rank's (batch, weight) for every window of ``size * count`` indices.

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
        trains: returns at the end whether the pass has turned out to need `even`.
    """
    pending: list[Any] = []
    # Only evaluations on several ranks may need the last full batch again; nothing else is read ahead, since a sampler
    # or a stream may depend on what the training did with the batch before.
    ahead = halve and count > 1 and not even
    while len(window := take(size * count)) == size * count:
        if not ahead:
            yield window[index::count], 1.0
            continue
        if pending:
            yield pending, 1.0
        pending = window[index::count]
    if window and not drop_last:
        mine = window[index::count]
        if not mine and (even or trains()):
            mine, weight = window[:size], 0.0
        else:
            weight = len(mine) * count / len(window)
        if not mine and len(pending) > 1:
            # Fewer samples than ranks are left: splitting a batch of this rank keeps the numbers of batches equal.
            pending, mine, weight = pending[:-1], pending[-1:], 1.0
        yield from (share for share in ((pending, 1.0), (mine, weight)) if share[0])
    elif pending:
        yield pending, 1.0


def share_batches(
    take: Callable[[int], list[Any]], *, index: int, count: int, even: bool, trains: Callable[[], bool] = bool
) -> Iterator[Share]:
    """Yield this rank's (batch, weight) for every window of `count` complete batches of a custom sampler."""
    while window := take(count):
        sizes = [_size(batch) for batch in window]
        if index < len(window):
            yield window[index], sizes[index] * count / max(sum(sizes), 1)
        elif even or trains():
            yield window[0], 0.0


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
        add_weight: called with the weight of every batch, in order.
        skip: number of batches to leave out, which were read before this process started.
        seeds: returns the seed of each batch, if worker processes make it.
        trains: returns at the end whether every rank needs a batch in every window.
        origin: number of indices (or batches, of a batch sampler) that all ranks read before; shares begin after them.
        first: number of the first batch after `origin`.
    """

    random_stream: RandomStream | None
    even: bool
    add_weight: Callable[[float], None]
    skip: int
    seeds: BatchSeeds | None = None
    trains: Callable[[], bool] = bool
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
        take = _taker(self._inner.sampler if flat else self._inner, start.random_stream)
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
                trains=start.trains,
            )
        else:
            shares = share_batches(take, index=self._index, count=self._count, even=start.even, trains=start.trains)
        for batch, weight in itertools.islice(shares, start.skip, None):
            start.add_weight(weight)
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


def _taker(source: Any, random_stream: RandomStream | None) -> Callable[[int], list[Any]]:
    iterator = _iterate(source)

    def take(number: int) -> list[Any]:
        if random_stream is None:
            return list(itertools.islice(iterator, number))
        with random_stream.active():
            return list(itertools.islice(iterator, number))

    return take


def _iterate(source: Any) -> Iterator[Any]:
    yield from source  # a generator: `iter(source)` may draw random numbers, and runs with the first item only


class ShardedIterable(StandIn, IterableDataset[Any]):
    """Proxy of an iterable dataset that yields this rank's share of every window, as `WeightedItem` if `weighted`.

    Instances are pickled into worker processes.

    Attributes:
        compare: whether to compute the digest of the first window, for a comparison between ranks.
        window: that digest, if it was read in this process and is not in the first item.
    """

    _own = (
        *("_inner", "_size", "_drop_last", "_index", "_count", "_weighted", "_shuffle", "_shared", "_num_begun"),
        *("_num_iterations", "_even_length", "_random_stream", "_loaded", "_skip", "compare", "window"),
    )

    def __init__(
        self, inner: Any, *, size: int, drop_last: bool, index: int, count: int, weighted: bool, shuffle: Shuffle
    ) -> None:
        self._inner = inner
        self._size = size
        self._drop_last = drop_last
        self._index = index
        self._count = count
        self._weighted = weighted
        self._shuffle = shuffle
        #: Epoch, whether steps must be even, and number of epochs begun. A tensor, to share it with persistent workers.
        self._shared = torch.zeros(3, dtype=torch.int64)
        self._num_begun = -1
        self._num_iterations = 0
        self._even_length: bool | None = None
        self._random_stream: RandomStream | None = None
        self._loaded: Any = None
        self._skip = 0
        self.compare = False
        self.window: str | None = None

    # Method names must not hide those of the user's datasets, such as `set_epoch`.

    def capture_stream(self) -> dict[str, Any] | None:
        """Return the position of the pass that began last, None if the stream has no ``state_dict``."""
        if self._random_stream is None or not is_stateful(self._inner):
            return None
        return {"stream": self._inner.state_dict(), "draws": self._random_stream.state()}

    def resume_stream(self, position: Mapping[str, Any]) -> None:
        """Make the next pass begin at a position returned by `capture_stream`."""
        self._inner.load_state_dict(position["stream"])
        self._loaded = position["draws"]

    def skip_items(self, number: int) -> None:
        """Make the next pass read and drop the first `number` items. Only without worker processes."""
        self._skip = number

    def share_memory(self) -> None:
        """Share later epochs with persistent worker processes."""
        self._shared.share_memory_()  # type: ignore[no-untyped-call]

    def begin_epoch(self, epoch: int, *, even: bool) -> None:
        """Set the epoch that starts, and whether its steps must be even."""
        self._shared[0], self._shared[1] = epoch, even
        self._shared[2] += 1

    def require_even_steps(self) -> None:
        """Make the steps of the current epoch even, also after it began."""
        self._shared[1] = True

    def seed_of_worker(self, worker: int) -> int:
        """Return a seed for worker `worker` in the epoch that starts, equal on all ranks."""
        return self._shuffle.seed_of(int(self._shared[0]), -1, worker)

    def num_batches(self, even: bool, loader_length: Callable[[], int]) -> int:
        """Return the number of batches of this rank's share.

        Args:
            loader_length: the ``__len__`` of the loader, which calls that of this dataset.
        """
        self._even_length = even
        try:
            return loader_length()
        finally:
            self._even_length = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt(self)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        epoch, even, num_begun = (int(value) for value in self._shared)
        # A loader class may iterate again within one pass, without `begin_epoch`.
        self._num_iterations = self._num_iterations + 1 if num_begun == self._num_begun else 0
        self._num_begun = num_begun
        stream = self._num_iterations * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        random_stream = self._shuffle.random_stream(epoch, every=True, stream=stream)
        if self._loaded is not None:
            random_stream.load_state(self._loaded)
            self._loaded = None
        self._random_stream = None if worker else random_stream
        take = _taker(self._inner, random_stream)
        skip, self._skip = self._skip, 0
        return self._share(take, bool(even), skip)

    def _sizes(self) -> dict[str, Any]:
        return {"size": self._size, "drop_last": self._drop_last, "index": self._index, "count": self._count}

    def _share(self, take: Callable[[int], list[Any]], even: bool, skip: int) -> Iterator[Any]:
        while skip and take(min(skip, self._size)):
            skip -= min(skip, self._size)
        worker = get_worker_info()
        digests: list[str] = []
        if self.compare and (worker is None or worker.id == 0):
            take = _with_first_digest(take, digests)
        shares = share_indices(take, **self._sizes(), even=even, halve=False, trains=lambda: bool(self._shared[1]))
        for batch, weight in shares:
            for item in batch:
                window = digests.pop() if digests else None
                if self._weighted:
                    yield WeightedItem(item, weight, window)
                else:
                    self.window = window or self.window
                    yield item


def _with_first_digest(take: Callable[[int], list[Any]], digests: list[str]) -> Callable[[int], list[Any]]:
    """Return a `take` that appends the digest of the first window to `digests`."""
    first = True

    def take_and_digest(number: int) -> list[Any]:
        nonlocal first
        window = take(number)
        if first:
            first = False
            digests.append(window_digest(window))
        return window

    return take_and_digest


class SizedShardedIterable(ShardedIterable):
    """`ShardedIterable` of a dataset with a length."""

    _own = ShardedIterable._own

    def __len__(self) -> int:
        number = len(self._inner)
        if self._even_length is None:  # called by the user: the length of the dataset
            return number
        batches = num_batches(number, **self._sizes(), even=self._even_length, halve=False)
        return batches * self._size


class WeightedItem(NamedTuple):
    """An item of a stream, the weight of its batch, and the digest of the first window in the first item."""

    item: Any
    weight: float
    window: str | None = None


class WeightedCollate:
    """Collates `WeightedItem` items and returns the weight with the batch. Pickled into worker processes."""

    def __init__(self, inner: Callable[[Any], Any], *, batched: bool) -> None:
        self.inner = inner
        self.batched = batched

    def __call__(self, data: Any) -> Any:
        first = data[0] if self.batched and data else data
        if not isinstance(first, WeightedItem):  # called by the user
            return self.inner(data)
        inner = [each.item for each in data] if self.batched else first.item
        return WeightedItem(self.inner(inner), first.weight, first.window)
