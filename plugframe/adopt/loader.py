"""The user's DataLoader, which reads this rank's share and hands over batches on this rank's device."""

from __future__ import annotations

import functools
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
    DistributedSampler,
    IterableDataset,
    SequentialSampler,
    get_worker_info,
)

from plugframe.adopt.order import Draws, Order, owns_generator
from plugframe.adopt.shard import ShardedIndices, ShardedIterable, WeighedCollate
from plugframe.adopt.swap import KEY, adopt, release

_EXHAUSTED = object()


class LoaderState:
    """What an adopted loader knows.

    Attributes:
        original: the user's class.
        epoch: how many epochs were started.
        training: whether the epoch that starts now trains: every rank must then take part in every step.
        replaced: attributes of the loader that something stands in for, to be put back.
        weight: what the last batch weighs against those of the other ranks; None outside of an epoch.
    """

    original: Any

    def __init__(self, *, hooks: Any, device: Any, order: Order, index: int, count: int, weigh: bool) -> None:
        self.hooks = hooks
        self.device = device
        self.order = order
        self.index = index
        self.count = count
        self.weigh = weigh
        self.epoch = 0
        self.training: Callable[[], bool] = lambda: False
        self.replaced: dict[str, Any] = {}
        self.epochs: list[EpochOf] = []
        self.indices: ShardedIndices | None = None
        self.iterable: ShardedIterable | None = None
        self.unwrap = False
        self.weight: float | None = None

    def plain_dict(self, obj: Any) -> dict[str, Any]:
        """Return the attributes of the plain object."""
        return {**{k: v for k, v in obj.__dict__.items() if k != KEY}, **self.replaced}

    def start_indices(self) -> tuple[Draws | None, bool]:
        """Return random numbers for the sampler of the epoch that starts, and whether steps must be even."""
        sampler = _sampler_of(self.indices)
        seeded = None if owns_generator(sampler) or type(sampler) is SequentialSampler else sampler
        draws = self.order.start(seeded, self.epoch - 1) if seeded is not None else None
        return draws, self.training()

    def start_epoch(self) -> None:
        """Count the epoch and tell it to what wants to know."""
        for target in self.epochs:
            target.tell(self.epoch)
        self.epoch += 1
        if self.iterable is not None:
            self.iterable._even = self.training()

    def next_weight(self) -> float:
        """Return the weight of the batch that was just read."""
        weights = self.indices.weights if self.indices is not None else None
        return weights.popleft() if weights and self.weigh else 1.0


class EpochOf:
    """Tells a sampler or dataset the epoch, unless the user does."""

    def __init__(self, target: Any, *, record: bool) -> None:
        self.target = target
        self.by_user = False
        self.told: int | None = None
        self._recorded = record
        if record:
            self._record()

    def _record(self) -> None:
        own = self.target.set_epoch

        @functools.wraps(own)
        def set_epoch(*args: Any, **kwargs: Any) -> Any:
            self.by_user = True
            return own(*args, **kwargs)

        self._own = own
        try:
            self.target.__dict__["set_epoch"] = set_epoch
        except AttributeError:
            self._recorded = False

    def tell(self, epoch: int) -> None:
        """Set the epoch, unless the user ever did."""
        current = getattr(self.target, "epoch", None)
        if self.by_user or (isinstance(current, int) and current != (self.told or 0)):
            return
        self.told = epoch
        (self._own if self._recorded else self.target.set_epoch)(epoch)

    def release(self) -> None:
        """Take the recording away."""
        if self._recorded:
            self.target.__dict__.pop("set_epoch", None)


class RankedWorker:
    """Seeds a worker process by rank as well: equal seeds on all ranks would augment alike on all of them."""

    def __init__(self, inner: Callable[[int], None] | None, rank: int) -> None:
        self.inner = inner
        self.rank = rank

    def __call__(self, worker: int) -> None:
        if self.rank:
            info = get_worker_info()
            seed = (info.seed if info else torch.initial_seed()) + self.rank * 0x9E3779B97F4A7C15
            torch.manual_seed(seed % 2**63)
            random.seed(seed % 2**63)
            numpy = sys.modules.get("numpy.random")
            if numpy:
                numpy.seed(seed % 2**32)
        if self.inner is not None:
            self.inner(worker)


def _iter(self: Any) -> Iterator[Any]:
    state: LoaderState = self.__dict__[KEY]
    state.start_epoch()
    return _batches(state, state.original.__iter__(self))


def _len(self: Any) -> int:
    state: LoaderState = self.__dict__[KEY]
    if state.indices is not None:
        return state.indices.length(even=state.training())
    return int(state.original.__len__(self))


def _batches(state: LoaderState, iterator: Iterator[Any]) -> Iterator[Any]:
    next_batch = state.hooks.strategy_next_batch
    move = state.hooks.accelerator_move_batch if state.device is not None else None
    try:
        while True:
            batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if batch is _EXHAUSTED:
                return
            if state.unwrap:
                batch, weight = batch
                state.weight = float(weight) if state.weigh else 1.0
            else:
                state.weight = state.next_weight()
            yield batch if move is None else move(batch=batch, device=state.device)
    finally:
        state.weight = None


def adopt_loader(
    loader: DataLoader[Any],
    *,
    hooks: Any,
    device: Any,
    order: Order,
    shard: tuple[int, int],
    training: Callable[[], bool],
    split: bool,
    weigh: bool,
) -> None:
    """Adopt `loader` in place.

    Args:
        device: where batches go; None leaves them where they are.
        shard: (index, count) of this rank's share.
        training: asked when an epoch starts.
        split: whether to divide the samples between the ranks; False leaves the sampler alone.
        weigh: whether uneven last batches weigh by their number of samples.
    """
    index, count = shard
    state = LoaderState(hooks=hooks, device=device, order=order, index=index, count=count, weigh=weigh)
    state.training = training
    if isinstance(loader.dataset, IterableDataset):
        if split and count > 1:
            _shard_iterable(loader, state)
    elif split and not isinstance(_sampler_of(_index_sampler(loader)), DistributedSampler):
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        state.indices = ShardedIndices(inner, index=index, count=count, start=state.start_indices)
        _stand_in(loader, state, name, state.indices)
    if count > 1 and loader.num_workers > 0:
        _stand_in(loader, state, "worker_init_fn", RankedWorker(loader.worker_init_fn, index))
    state.epochs = _epoch_targets(loader)
    adopt(loader, state, {"__iter__": _iter, "__len__": _len})


def release_loader(loader: DataLoader[Any]) -> None:
    """Give the loader back as it was."""
    state = release(loader)
    for name, value in state.replaced.items():
        object.__setattr__(loader, name, value)
    for target in state.epochs:
        target.release()


def _stand_in(loader: Any, state: LoaderState, name: str, value: Any) -> None:
    state.replaced[name] = getattr(loader, name)
    # DataLoader refuses to have some attributes set after its construction; here every reader of them is known.
    object.__setattr__(loader, name, value)


def _shard_iterable(loader: DataLoader[Any], state: LoaderState) -> None:
    batched = loader.batch_size is not None
    # A loader class with an __iter__ of its own would see the weights, which are ours.
    weighed = type(loader).__iter__ is DataLoader.__iter__
    state.iterable = ShardedIterable(
        loader.dataset,
        size=loader.batch_size or 1,
        drop_last=bool(loader.drop_last),
        index=state.index,
        count=state.count,
        weighed=weighed,
    )
    _stand_in(loader, state, "dataset", state.iterable)
    if weighed:
        _stand_in(loader, state, "collate_fn", WeighedCollate(loader.collate_fn, batched=batched))
        state.unwrap = True


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _sampler_of(batches: Any) -> Any:
    """Return what draws: the sampler inside a batch sampler, or the sampler itself."""
    return getattr(batches, "sampler", None) or getattr(batches, "_inner", batches)


def _epoch_targets(loader: DataLoader[Any]) -> list[EpochOf]:
    sampler = _index_sampler(loader)
    samplers = [getattr(sampler, "_inner", sampler), _sampler_of(sampler)]
    dataset = getattr(loader.dataset, "_inner", loader.dataset)
    found: dict[int, EpochOf] = {}
    for target, record in [*((s, True) for s in samplers), (dataset, False)]:
        if callable(getattr(target, "set_epoch", None)) and id(target) not in found:
            # A recording on the dataset would have to travel into worker processes.
            found[id(target)] = EpochOf(target, record=record)
    return list(found.values())


def random_sources(loader: DataLoader[Any]) -> list[torch.Generator]:
    """Return the generators the user gave the loader and its sampler."""
    sampler = _sampler_of(_index_sampler(loader)) if not isinstance(loader.dataset, IterableDataset) else None
    found = [getattr(loader, "generator", None), getattr(sampler, "generator", None)]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
