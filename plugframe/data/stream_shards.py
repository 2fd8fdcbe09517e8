"""Streams of Hugging Face's ``datasets`` that are read by shards; and ranks kept in step over them."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from plugframe.data.sharded_batches import num_samples
from plugframe.data.sharded_iterable import ShardedIterable
from plugframe.data.sharding import UNKNOWN, Share
from plugframe.errors import SettingError


def reads_shards(dataset: Any, count: int) -> bool:
    """Return whether a stream has shards that `count` ranks can divide evenly, and is not divided yet."""
    if count == 1 or type(dataset).__module__.partition(".")[0] != "datasets":
        return False
    number = getattr(dataset, "num_shards", 0)
    return isinstance(number, int) and number >= count and number % count == 0


class StreamShards(ShardedIterable):
    """Proxy of a stream that reads this rank's shards only, in batches of whatever number there is."""

    _own = (*ShardedIterable._own, "_part")
    comparable = False

    def __init__(self, inner: Any, *, index: int, count: int, **options: Any) -> None:
        super().__init__(inner, index=index, count=count, **options)
        split = importlib.import_module("datasets.distributed").split_dataset_by_node
        self._part = split(inner, rank=index, world_size=count)

    def begin_epoch(self, epoch: int, *, even: bool) -> None:
        """Set the epoch that starts: that of the user's stream, which the user may have set."""
        super().begin_epoch(epoch, even=even)
        if hasattr(self._part, "set_epoch"):
            self._part.set_epoch(getattr(self._inner, "epoch", epoch))

    def _source(self) -> Any:
        return self._part

    def _windows(self, take: Callable[[int], list[Any]], even: bool) -> Iterator[tuple[Any, Share]]:
        while items := take(1):
            yield items, Share(start=UNKNOWN)


class EvenSteps:
    """Keeps ranks in step, within one pass, that read different numbers of batches.

    In a training every rank takes part in every step: one without a batch left repeats its last one, of weight 0, until
    all ranks have read theirs. Weights are by numbers of samples.
    """

    def __init__(self, hooks: Any, exhausted: object) -> None:
        self._hooks = hooks
        self._exhausted = exhausted
        self._last: Any = exhausted
        self.ended = False

    def step(self, batch: Any) -> tuple[Any, Share]:
        """Return the batch of this step and its share; `exhausted` if no rank has one. Every rank must call it.

        Raises:
            SettingError: if this rank has read no batch at all, and others have.
        """
        self.ended = batch is self._exhausted
        number = 0 if self.ended else num_samples(batch)
        mine = torch.tensor(number, dtype=torch.float64)
        mean = float(self._hooks.collective_all_reduce(tensor=mine, op="mean", group=None))
        if not mean:
            return self._exhausted, Share(0.0, UNKNOWN)
        if self.ended and self._last is self._exhausted:
            raise SettingError(
                "The shards of a stream that this rank reads are empty, and other ranks have samples: divide it in the "
                "script, and pass use_distributed_sampler=False."
            )
        self._last = self._last if self.ended else batch
        return self._last, Share(number / mean, UNKNOWN, size=num_samples(self._last))
