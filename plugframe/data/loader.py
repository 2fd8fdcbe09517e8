"""The user's DataLoader, which reads this rank's share and hands over batches on this rank's device."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler, get_worker_info
from torch.utils.data import sampler as torch_samplers

from plugframe.data.epochs import epoch_targets
from plugframe.data.generators import Held, held_sources, reseed, salts
from plugframe.data.iteration import LoaderState, Reading
from plugframe.data.position import Layout
from plugframe.data.random_sources import has_state, random_sources
from plugframe.data.seed import rng_state
from plugframe.data.sharding import (
    ShardedIndices,
    ShardedIterable,
    SizedShardedIterable,
    Weighed,
    WeighedCollate,
    is_flat,
)
from plugframe.data.shuffle import Draws, Order
from plugframe.data.worker_seeding import SeededDataset, seed_here, tell_seed
from plugframe.errors import OrderError, SettingError
from plugframe.utils.logging import warn_caller
from plugframe.utils.swap import KEY, adopt, plain_class, release

_EXHAUSTED = object()


class RankedWorker:
    """Seeds a worker process by rank as well: equal seeds on all ranks would augment alike on all of them.

    A stream that is divided here sees the same seed on all ranks: it may shuffle by it.

    Args:
        inner: the loader's own ``worker_init_fn``.
        rank: of this rank's share of the data.
        collate: the loader's ``collate_fn``.
        salts: of the generators that the dataset and `collate` hold; see `plugframe.data.generators`.
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
            seed_here(seed)
        dataset = info.dataset if info else None
        if type(dataset) in (ShardedIterable, SizedShardedIterable):
            tell_seed(cast("ShardedIterable", dataset).seed_of_worker(worker))
        elif dataset is not None:
            reseed(held_sources(dataset=dataset, collate_fn=self.collate), self.salts, seed)
        if self.inner is not None:
            self.inner(worker)


def _iter(self: Any) -> Iterator[Any]:
    state: LoaderState | None = self.__dict__.get(KEY)
    original = plain_class(self).__iter__
    if state is None:
        return original(self)  # type: ignore[no-any-return]
    # A class with a way of its own to begin may read whatever it likes before and after; one that keeps its own
    # position begins as torch's does.
    seeded = state.indexed or (state.divided and not state.resumes)
    begin = functools.partial(_begin_seeded, state, original) if seeded else original
    reading = state.begin()
    if state.moved:
        state.moved = False
        # What it draws to begin, it drew before the checkpoint was saved.
        with state.replaying({"rng": rng_state()}):
            return _batches(state, reading, begin(self))
    if state.kept is None:
        return _batches(state, reading, begin(self))
    kept, state.kept = state.kept, None
    reading.position = kept["position"]
    # Where batches are made from indices, those that were read need not be made again; a stream can only be read.
    reading.origin, reading.first = kept["origin"], kept["first"]
    if state.indexed:
        reading.skip = reading.position
    elif kept["place"] is not None and state.iterable is not None and self.num_workers == 0:
        state.iterable.go_on(kept["place"])
        with state.replaying(kept):  # what it drew to begin, it drew before the checkpoint was saved
            return _batches(state, reading, begin(self))
    if state.iterable is not None:
        state.iterable.pass_over(reading.origin)
    again = reading.position - reading.skip
    if again and state.index == 0:
        hint = " A stream with state_dict() that is read without workers goes on by itself." if state.iterable else ""
        what = f"{again} batches of a {type(self).__name__} are read again and passed over, to go on where the run was."
        warn_caller(what + hint)
    with state.replaying(kept):
        iterator = begin(self)
        for _ in range(again):
            state.hooks.strategy_next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if reading.weights:
                reading.weights.popleft()
    return _batches(state, reading, iterator)


def _begin_seeded(state: LoaderState, original: Callable[[Any], Iterator[Any]], loader: Any) -> Iterator[Any]:
    """Begin a pass; worker processes, if there are any, are given a dataset that seeds them for each batch."""
    if loader.num_workers == 0:
        return original(loader)
    dataset = loader.dataset
    state.seeding = True
    # DataLoader refuses to have its dataset set; the user's own is back before anybody sees the loader again.
    object.__setattr__(loader, "dataset", SeededDataset(dataset, loader.collate_fn, state.salts))
    try:
        return original(loader)
    finally:
        object.__setattr__(loader, "dataset", dataset)
        state.seeding = False


def _len(self: Any) -> int:
    state: LoaderState | None = self.__dict__.get(KEY)
    count = functools.partial(plain_class(self).__len__, self)
    if state is None or state.iterable is None:
        return int(count())
    return int(state.iterable.length(state.training(), count))


def _batches(state: LoaderState, reading: Reading, iterator: Iterator[Any]) -> Iterator[Any]:
    next_batch = state.hooks.strategy_next_batch
    move = state.hooks.accelerator_move_batch if state.device is not None else None
    state.open(reading)
    state.beginning = reading  # a loader class may ask for its indices only now
    evaluates = False
    try:
        while True:
            if reading.unsure:
                evaluates = state.evaluates(reading)
            if evaluates:
                # So that a strategy whose ranks evaluate together knows it too, at the end of the loader.
                with torch.no_grad():
                    batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            else:
                batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if batch is _EXHAUSTED:
                return
            if type(batch) is Weighed:
                batch, weight, window = batch
                reading.weights.append(float(weight))
                if window is not None:
                    state.compare_window(window)
            elif not reading.handed and state.iterable is not None and state.iterable.window is not None:
                state.compare_window(state.iterable.window)
            if evaluates and reading.weights and not reading.weights[0]:
                state.withhold(reading)
                continue
            if move is not None:
                batch = move(batch=batch, device=state.device)
            state.hand_over(reading, batch)
            yield batch
    finally:
        state.close(reading)


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
) -> LoaderState:
    """Adopt `loader` in place, and return what it knows.

    Args:
        device: where batches go; None leaves them where they are.
        shard: (index, count) of this rank's share.
        training: asked when an epoch starts.
        split: whether to divide the samples between the ranks; False leaves the sampler alone.
        weigh: whether uneven last batches weigh by their number of samples.

    Raises:
        OrderError: if it is being read already.
        SettingError: if its sampler divides the data between other ranks than these.
    """
    index, count = shard
    check_unread(loader)
    state = LoaderState(hooks=hooks, device=device, order=order, training=training, weigh=weigh)
    state.sources = sources_of(loader)
    state.index, state.count = index, count
    # A loader that keeps its own position is not to be moved on twice.
    state.resumes = not has_state(loader)
    state.loader = weakref.ref(loader)
    state.targets = epoch_targets(_epoch_candidates(loader))
    if isinstance(loader.dataset, IterableDataset):
        if split:
            _shard_iterable(loader, state, index, count)
    elif split:
        name = "sampler" if loader.batch_sampler is None else "batch_sampler"
        inner = getattr(loader, name)
        state.draws = functools.partial(_draws, inner, order)
        state.divided = True
        begin = state.begin_indices
        part = (0, 1) if divides_itself(loader, index, count) else shard
        _stand_in(loader, state, name, ShardedIndices(inner, index=part[0], count=part[1], begin=begin, even=training))
    state.indexed = state.divided and type(loader).__iter__ is DataLoader.__iter__
    state.layout = _layout(loader, state, index, count)
    _seed_apart(loader, state, index, count)
    namespace: dict[str, Any] = {"__iter__": _iter}
    if type(state.iterable) is SizedShardedIterable:
        namespace["__len__"] = _len
    _forget_workers(loader)
    adopt(loader, state, namespace)
    return state


def release_loader(loader: DataLoader[Any]) -> None:
    """Give the loader back as it was."""
    state = release(loader)
    for name, value in state.replaced.items():
        object.__setattr__(loader, name, value)
    for target in state.targets:
        target.release()
    _forget_workers(loader)


def _layout(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> Layout:
    """Return what a position in the loader goes by; where ranks or batches cannot change, its kind says why."""
    size, plain = loader.batch_size or 1, type(loader).__iter__ is DataLoader.__iter__
    if not state.resumes:
        return Layout("it keeps its position itself", size, count)
    if not plain:
        return Layout("its __iter__ decides what it reads", size, count)
    if state.iterable is not None:
        return Layout("stream", size, count, loader.num_workers)
    if not state.divided:
        return Layout("the script divides its data itself (use_distributed_sampler=False)", size, count)
    if divides_itself(loader, index, count):
        return Layout("its sampler divides the data itself", size, count)
    inner = state.replaced["batch_sampler" if loader.batch_sampler is not None else "sampler"]
    return Layout("samples", inner.batch_size, count) if is_flat(inner) else Layout("batches", 1, count)


def _seed_apart(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> None:
    """Have the generators that samples are changed with give other numbers on each rank."""
    if state.iterable is None:
        held = held_by(loader)
        state.salts = salts(held)
        # A dataset that hears of the epoch may shuffle itself then, alike on all ranks.
        if loader.num_workers == 0 and not hasattr(loader.dataset, "set_epoch"):
            state.held = held
            if index:
                reseed(held, state.salts, index)
    if loader.num_workers > 0 and (count > 1 or state.iterable is not None):
        ranked = RankedWorker(loader.worker_init_fn, index, loader.collate_fn, state.salts)
        _stand_in(loader, state, "worker_init_fn", ranked)


def _stand_in(loader: Any, state: LoaderState, name: str, value: Any) -> None:
    state.replaced[name] = getattr(loader, name)
    # DataLoader refuses to have some attributes set after its construction; here every reader of them is known.
    object.__setattr__(loader, name, value)


def _forget_workers(loader: Any) -> None:
    """End worker processes that outlive an epoch: they know the sampler and the dataset of before."""
    if vars(loader).get("_iterator") is not None:
        object.__setattr__(loader, "_iterator", None)


def check_unread(loader: DataLoader[Any]) -> None:
    """Refuse a loader class that holds a pass over undivided data.

    Raises:
        OrderError: naming the attribute.
    """
    for name, value in vars(loader).items():
        ours = any(klass.__module__ == DataLoader.__module__ for klass in type(value).__mro__)
        if name != "_iterator" and ours and isinstance(value, Iterator):
            raise OrderError(
                f"This {type(loader).__name__} holds in .{name} a pass over its data that began before set-up and is "
                "not divided between ranks: begin it after lite.setup_dataloaders()."
            )


def _shard_iterable(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> None:
    batched = loader.batch_size is not None
    # A loader class with an __iter__ of its own would see the weights, which are ours.
    weighed = count > 1 and type(loader).__iter__ is DataLoader.__iter__
    kind = SizedShardedIterable if hasattr(type(loader.dataset), "__len__") else ShardedIterable
    state.iterable = kind(
        loader.dataset,
        size=loader.batch_size or 1,
        drop_last=bool(loader.drop_last),
        index=index,
        count=count,
        weighed=weighed,
        order=state.order,
    )
    if loader.num_workers > 0 and loader.persistent_workers:
        state.iterable.share_memory()
    _stand_in(loader, state, "dataset", state.iterable)
    if weighed:
        _stand_in(loader, state, "collate_fn", WeighedCollate(loader.collate_fn, batched=batched))


def _draws(batches: Any, order: Order, epoch: int) -> Draws | None:
    """Return random numbers for a sampler that draws from the process's generators, as far as can be known."""
    source = batches.sampler if is_flat(batches) else batches
    if isinstance(source, (list, tuple, range)) or type(source) is SequentialSampler:
        return None
    torchs = type(source).__module__ == torch_samplers.__name__
    if torchs and isinstance(getattr(source, "generator", None), torch.Generator):
        return None
    # torch's own samplers draw whatever they draw before they give the first index.
    return order.draws(epoch, every=not torchs)


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """Return what gives the indices: a sampler, or a batch sampler and the sampler in it."""
    if isinstance(loader.dataset, IterableDataset):
        return []
    outer = _index_sampler(loader)
    inner = getattr(outer, "sampler", None)
    return [outer] if inner is None else [outer, inner]


def divides_itself(loader: DataLoader[Any], index: int, count: int) -> bool:
    """Say whether a sampler of the loader divides the data between the ranks, as a ``DistributedSampler`` does.

    Raises:
        SettingError: if it divides it between other ranks than these.
    """
    for sampler in _samplers(loader):
        rank, ranks = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        if not isinstance(sampler, DistributedSampler) and not (isinstance(rank, int) and isinstance(ranks, int)):
            continue
        if (rank, ranks) != (index, count):
            raise SettingError(
                f"This {type(sampler).__name__} reads share {rank} of {ranks}, and this rank is to read share {index} "
                f"of {count}: make it with num_replicas={count} and this rank's rank=, or pass a sampler that knows "
                "of no ranks."
            )
        return True
    return False


def _epoch_candidates(loader: DataLoader[Any]) -> list[Any]:
    return [*_samplers(loader), loader.dataset]


def held_by(loader: DataLoader[Any]) -> Held:
    """Return the user's own generators that the samples of a map-style loader are changed with."""
    if isinstance(loader.dataset, IterableDataset):
        return {}
    ordering = {id(source) for source in sources_of(loader)}
    # In this process those of the script are left alone: it may draw from them what must be equal on all ranks.
    module_level = loader.num_workers > 0
    held = held_sources(module_level=module_level, dataset=loader.dataset, collate_fn=loader.collate_fn)
    return {path: source for path, source in held.items() if id(source) not in ordering}


def sources_of(loader: DataLoader[Any]) -> list[Any]:
    """Return the user's own generators that the samples of a loader are drawn from."""
    streams = [loader.dataset] if isinstance(loader.dataset, IterableDataset) else []
    generator = [loader.generator] if isinstance(loader.generator, torch.Generator) else []
    found = [*generator, *random_sources(*_samplers(loader), *streams)]
    return list({id(source): source for source in found}.values())
