"""Divide an iterable dataset between ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from plugframe.data.sharding import Share, make_take, num_batches, share_indices
from plugframe.data.shuffle import RandomStream, Shuffle
from plugframe.data.stateful import is_stateful
from plugframe.data.stream_check import window_digest
from plugframe.utils.proxy import StandIn, rebuilt


class ShardedIterable(StandIn, IterableDataset[Any]):
    """Proxy of an iterable dataset that yields this rank's share of every window, as `WeightedItem` if `weighted`.

    Instances are pickled into worker processes.

    Attributes:
        compare: whether to compute the digest of the first window, for a comparison between ranks.
        window: that digest, if it was read in this process and is not in the first item.
    """

    _own: ClassVar[tuple[str, ...]] = (
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

    #: Whether all ranks read the same items and keep a share each.
    comparable = True

    # Method names must not hide those of the user's datasets, such as `set_epoch`.

    def capture_stream(self) -> dict[str, Any] | None:
        """Return the position of the pass that began last, None if the stream has no ``state_dict``."""
        if self._random_stream is None or not is_stateful(self._source()):
            return None
        return {"stream": self._source().state_dict(), "draws": self._random_stream.state()}

    def resume_stream(self, position: Mapping[str, Any]) -> None:
        """Make the next pass begin at a position returned by `capture_stream`."""
        self._source().load_state_dict(position["stream"])
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
        take = make_take(self._source(), random_stream)
        skip, self._skip = self._skip, 0
        return self._share(take, bool(even), skip)

    def _source(self) -> Any:
        """Return what is read."""
        return self._inner

    def _sizes(self) -> dict[str, Any]:
        return {"size": self._size, "drop_last": self._drop_last, "index": self._index, "count": self._count}

    def _share(self, take: Callable[[int], list[Any]], even: bool, skip: int) -> Iterator[Any]:
        while skip and take(min(skip, self._size)):
            skip -= min(skip, self._size)
        worker = get_worker_info()
        digests: list[str] = []
        if self.compare and (worker is None or worker.id == 0):
            take = _with_first_digest(take, digests)
        for batch, share in self._windows(take, even):
            for item in batch:
                window = digests.pop() if digests else None
                if self._weighted:
                    yield WeightedItem(item, share, window)
                else:
                    self.window = window or self.window
                    yield item

    def _windows(self, take: Callable[[int], list[Any]], even: bool) -> Iterator[tuple[Any, Share]]:
        """Yield this rank's items of each window, and the share of the batch they make."""
        return share_indices(
            take,
            **self._sizes(),
            even=even,
            halve=False,
            pad=lambda: self._weighted,
            trains=lambda: bool(self._shared[1]),
        )


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
    """An item of a stream, the share of its batch, and the digest of the first window in the first item."""

    item: Any
    share: Share
    window: str | None = None


class WeightedCollate:
    """Collates `WeightedItem` items and returns the share with the batch. Pickled into worker processes."""

    def __init__(self, inner: Callable[[Any], Any], *, batched: bool) -> None:
        self.inner = inner
        self.batched = batched

    def __call__(self, data: Any) -> Any:
        first = data[0] if self.batched and data else data
        if not isinstance(first, WeightedItem):  # called by the user
            return self.inner(data)
        inner = [each.item for each in data] if self.batched else first.item
        return WeightedItem(self.inner(inner), first.share, first.window)
