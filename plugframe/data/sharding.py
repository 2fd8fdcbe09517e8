"""Which samples of each global batch a rank reads, and how much they weigh.

A *window* is what all ranks together read in one step: the batch one process would read that had the whole
batch size. A rank's batch of n out of the window's N samples weighs ``n * ranks / N``: multiplied with a loss
that is a mean over the rank's batch, the mean over ranks is the mean over the window. It is 1 but for the
last window of an epoch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.data import BatchSampler, IterableDataset, get_worker_info

from plugframe.data.random_sources import has_state
from plugframe.data.shuffle import Draws, Order
from plugframe.data.stream_check import digest_of
from plugframe.data.worker_seeding import SeededIndices, Seeds
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
        index: of this rank.
        count: of ranks.
        even: give every rank a batch in every window, if need be one that weighs 0; otherwise every index is
            read exactly once, and the numbers of batches are still equal where that is possible.
        halve: whether a rank that would be one batch short may read its last batch in two. A stream cannot: torch
            makes batches of a size, and sees no ends but the last.
        trains: asked at the end whether the pass has turned out to need `even` after all.
    """
    held: list[Any] = []
    # Only evaluations over several ranks may need the last full batch once more; nothing else is read ahead, since
    # a sampler or a stream may go by what the training has done with the batch before.
    ahead = halve and count > 1 and not even
    while len(window := take(size * count)) == size * count:
        if not ahead:
            yield window[index::count], 1.0
            continue
        if held:
            yield held, 1.0
        held = window[index::count]
    if window and not drop_last:
        mine = window[index::count]
        if not mine and (even or trains()):
            mine, weight = window[:size], 0.0
        else:
            weight = len(mine) * count / len(window)
        if not mine and len(held) > 1:
            # Fewer samples than ranks are left. A batch of this rank in two keeps the ranks in step.
            held, mine, weight = held[:-1], held[-1:], 1.0
        yield from (share for share in ((held, 1.0), (mine, weight)) if share[0])
    elif held:
        yield held, 1.0


def share_batches(
    take: Callable[[int], list[Any]], *, index: int, count: int, even: bool, trains: Callable[[], bool] = bool
) -> Iterator[Share]:
    """Yield this rank's (batch, weight) for every window of `count` whole batches, of a sampler of the user's own."""
    while window := take(count):
        sizes = [_size(batch) for batch in window]
        if index < len(window):
            yield window[index], sizes[index] * count / max(sum(sizes), 1)
        elif even or trains():
            yield window[0], 0.0


def num_batches(
    number: int, *, size: int, drop_last: bool, index: int, count: int, even: bool, halve: bool = True
) -> int:
    """Return how many batches `share_indices` yields of `number` indices."""
    full, rest = divmod(number, size * count)
    if drop_last or not rest:
        return full
    return full + (even or index < rest or (halve and full > 0 and size > 1))


def _size(batch: Any) -> int:
    """Return how many samples what a batch sampler yields stands for: a key, which may be text, or several."""
    if isinstance(batch, (str, bytes)) or not hasattr(batch, "__len__") or getattr(batch, "ndim", 1) == 0:
        return 1
    return len(batch)


class Start(NamedTuple):
    """What a pass over indices starts with.

    Attributes:
        draws: random numbers for the sampler; None if it needs none.
        even: whether every rank gets a batch in every window.
        weigh: told the weight of every batch, in order.
        skip: batches to leave out, read before this process was started.
        seeds: gives each batch its seed, if worker processes make it.
        trains: asked at the end whether every rank needs a batch in every window after all.
        origin: how many indices (or batches, of a batch sampler) all ranks read before: the shares begin after them.
        first: the number of the first batch after `origin`.
    """

    draws: Draws | None
    even: bool
    weigh: Callable[[float], None]
    skip: int
    seeds: Seeds | None = None
    trains: Callable[[], bool] = bool
    origin: int = 0
    first: int = 0


class ShardedIndices(StandIn):
    """Stands in for a loader's sampler: yields this rank's share."""

    _own = ("_inner", "_index", "_count", "_begin", "_even")

    def __init__(
        self, inner: Any, *, index: int, count: int, begin: Callable[[], Callable[[], Start]], even: Callable[[], bool]
    ) -> None:
        self._inner = inner
        self._index = index
        self._count = count
        self._begin = begin
        self._even = even

    def __iter__(self) -> Iterator[Any]:
        # Here, not at the first index: two passes may be open at once.
        return self._share(self._begin())

    def _share(self, begun: Callable[[], Start]) -> Iterator[Any]:
        # And this not there: with worker processes torch asks for an iterator twice, and uses the second.
        start = begun()
        # One rank reads what the user's own sampler yields; every batch weighs 1.
        alone = self._count == 1 and not start.origin
        batches = itertools.islice(_drawn(self._inner, start.draws), start.skip, None) if alone else self._part(start)
        if start.seeds is None:
            yield from batches
        else:
            yield from map(SeededIndices, batches, map(start.seeds, itertools.count(start.first + start.skip)))

    def _part(self, start: Start) -> Iterator[Any]:
        flat = is_flat(self._inner)
        take = _taker(self._inner.sampler if flat else self._inner, start.draws)
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
            start.weigh(weight)
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
    """Say whether a sampler cuts another's indices into equal pieces: only torch's own is known to."""
    return type(batches) is BatchSampler


def _drawn(source: Any, draws: Draws | None) -> Iterator[Any]:
    """Return what `source` yields, drawn from `draws`, at the cost of a plain iterator where that can be."""
    if draws is None:
        return iter(source)
    iterator = _iterate(source)

    def take() -> list[Any]:
        with draws.drawing():
            return list(itertools.islice(iterator, 1))

    if draws.every:
        return itertools.chain.from_iterable(iter(take, []))
    return itertools.chain(take(), iterator)


def _taker(source: Any, draws: Draws | None) -> Callable[[int], list[Any]]:
    iterator = _iterate(source)

    def take(number: int) -> list[Any]:
        if draws is None:
            return list(itertools.islice(iterator, number))
        with draws.drawing():
            return list(itertools.islice(iterator, number))

    return take


def _iterate(source: Any) -> Iterator[Any]:
    yield from source  # begun when the first is taken: what draws may do so as soon as it is begun


class ShardedIterable(StandIn, IterableDataset[Any]):
    """Stands in for an iterable dataset: yields this rank's share of every window, as `Weighed` items if `weighed`.

    It is pickled into worker processes.

    Attributes:
        compare: whether what the first window is known by is wanted, for a comparison with the other ranks.
        window: that, where it was read in this process and is not in the first item.
    """

    _own = (
        *("_inner", "_size", "_drop_last", "_index", "_count", "_weighed", "_order"),
        *("_told", "_turn", "_passes", "_counted", "_draws", "_place", "_origin", "compare", "window"),
    )

    def __init__(
        self, inner: Any, *, size: int, drop_last: bool, index: int, count: int, weighed: bool, order: Order
    ) -> None:
        self._inner = inner
        self._size = size
        self._drop_last = drop_last
        self._index = index
        self._count = count
        self._weighed = weighed
        self._order = order
        #: Epoch, whether steps must be even, and how often told. A tensor: workers that stay must hear of it too.
        self._told = torch.zeros(3, dtype=torch.int64)
        self._turn = -1
        self._passes = 0
        self._counted: bool | None = None
        self._draws: Draws | None = None
        self._place: Any = None
        self.compare = False
        self.window: str | None = None
        self._origin = 0

    def place(self) -> dict[str, Any] | None:
        """Return where the pass that began last is, None if the stream cannot tell."""
        if self._draws is None or not has_state(self._inner):
            return None
        return {"stream": self._inner.state_dict(), "draws": self._draws.state()}

    def go_on(self, place: Mapping[str, Any]) -> None:
        """Have the next pass begin where `place` was asked."""
        self._inner.load_state_dict(place["stream"])
        self._place = place["draws"]

    def pass_over(self, number: int) -> None:
        """Have the next pass begin after `number` items, which are read for nothing. Without worker processes."""
        self._origin = number

    def share_memory(self) -> None:
        """Let worker processes that outlive an epoch hear `tell`."""
        self._told.share_memory_()  # type: ignore[no-untyped-call]

    def tell(self, epoch: int, *, even: bool) -> None:
        """Set the epoch that starts, and whether its steps must be even."""
        self._told[0], self._told[1] = epoch, even
        self._told[2] += 1

    def tell_more(self, *, even: bool) -> None:
        """Say in the middle of an epoch that its steps must be even."""
        self._told[1] = even

    def seed_of_worker(self, worker: int) -> int:
        """Return a seed for worker `worker` in the epoch that starts, equal on all ranks."""
        return self._order.seed_of(int(self._told[0]), -1, worker)

    def length(self, even: bool, original: Callable[[], int]) -> int:
        """Return what `original`, which counts the batches of a loader, says for this rank's share."""
        self._counted = even
        try:
            return original()
        finally:
            self._counted = None

    def __reduce_ex__(self, protocol: Any) -> Any:
        return rebuilt(self)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        epoch, even, turn = (int(value) for value in self._told)
        # A loader class may begin anew within one pass, of which it is not told.
        self._passes = self._passes + 1 if turn == self._turn else 0
        self._turn = turn
        part = self._passes * (worker.num_workers if worker else 1) + (worker.id if worker else 0)
        draws = self._order.draws(epoch, every=True, part=part)
        if self._place is not None:
            draws.restore(self._place)
            self._place = None
        self._draws = None if worker else draws
        take = _taker(self._inner, draws)
        origin, self._origin = self._origin, 0
        return self._share(take, bool(even), origin)

    def _cut(self) -> dict[str, Any]:
        return {"size": self._size, "drop_last": self._drop_last, "index": self._index, "count": self._count}

    def _share(self, take: Callable[[int], list[Any]], even: bool, origin: int) -> Iterator[Any]:
        while origin and take(min(origin, self._size)):
            origin -= min(origin, self._size)
        worker = get_worker_info()
        noted: list[str] = []
        if self.compare and (worker is None or worker.id == 0):
            take = _noting(take, noted)
        shares = share_indices(take, **self._cut(), even=even, halve=False, trains=lambda: bool(self._told[1]))
        for batch, weight in shares:
            for item in batch:
                window = noted.pop() if noted else None
                if self._weighed:
                    yield Weighed(item, weight, window)
                else:
                    self.window = window or self.window
                    yield item


def _noting(take: Callable[[int], list[Any]], noted: list[str]) -> Callable[[int], list[Any]]:
    """Return `take`, which notes in `noted` what the first window it gives is known by."""
    first = True

    def taking(number: int) -> list[Any]:
        nonlocal first
        window = take(number)
        if first:
            first = False
            noted.append(digest_of(window))
        return window

    return taking


class SizedShardedIterable(ShardedIterable):
    """The same for a dataset that knows its length."""

    _own = ShardedIterable._own

    def __len__(self) -> int:
        number = len(self._inner)
        if self._counted is None:  # asked by the user, of the data
            return number
        batches = num_batches(number, **self._cut(), even=self._counted, halve=False)
        return batches * self._size


class Weighed(NamedTuple):
    """An item of a stream, what the batch it belongs to weighs, and what the first window of all is known by."""

    item: Any
    weight: float
    window: str | None = None


class WeighedCollate:
    """Collates `Weighed` items and hands the weight on. It is pickled into worker processes."""

    def __init__(self, inner: Callable[[Any], Any], *, batched: bool) -> None:
        self.inner = inner
        self.batched = batched

    def __call__(self, data: Any) -> Any:
        first = data[0] if self.batched and data else data
        if not isinstance(first, Weighed):  # called by the user
            return self.inner(data)
        inner = [each.item for each in data] if self.batched else first.item
        return Weighed(self.inner(inner), first.weight, first.window)
