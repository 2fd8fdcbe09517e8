"""Adopt a DataLoader in place: it reads this rank's share and returns batches on this rank's device."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, SequentialSampler
from torch.utils.data import sampler as torch_samplers

from plugframe.data.epochs import epoch_setters
from plugframe.data.generators import Generators, find_generators, generator_attributes, reseed, salts
from plugframe.data.iterables import Batches
from plugframe.data.iteration import LoaderState
from plugframe.data.loader_pass import LoaderPass
from plugframe.data.position import Layout
from plugframe.data.sharded_batches import ShardedBatches, SizedShardedBatches
from plugframe.data.sharded_iterable import ShardedIterable, SizedShardedIterable, WeightedCollate, WeightedItem
from plugframe.data.sharding import ShardedIndices, Share, dropped_text, is_flat
from plugframe.data.shuffle import RandomStream, Shuffle
from plugframe.data.stateful import is_stateful
from plugframe.data.stream_shards import EvenSteps, StreamShards, reads_shards
from plugframe.data.worker_init import RankWorkerInit
from plugframe.data.worker_seeding import SeededDataset
from plugframe.errors import OrderError, SettingError
from plugframe.utils.logging import warn_caller
from plugframe.utils.swap import KEY, adopt, plain_class, release
from plugframe.utils.unlabelled import iterator_without_label

_EXHAUSTED = object()


def _iter(self: Any) -> Iterator[Any]:
    state: LoaderState | None = self.__dict__.get(KEY)
    original = plain_class(self).__iter__
    if state is None:
        return original(self)  # type: ignore[no-any-return]
    # Not for a class with its own __iter__, which may read anything before and after; a class with a ``state_dict``
    # begins as torch's does.
    begin = functools.partial(
        _begin, functools.partial(_begin_seeded, state, original) if state.one_for_one else original
    )
    loader_pass = state.begin()
    if state.position_loaded:
        state.position_loaded = False
        with state.replaying(None):  # draws at the beginning were made before the checkpoint was saved
            return _batches(state, loader_pass, begin(self))
    if state.resume_from is None:
        return _batches(state, loader_pass, begin(self))
    return _resume(self, state, loader_pass, begin)


def _resume(
    loader: Any, state: LoaderState, loader_pass: LoaderPass, begin: Callable[[Any], Iterator[Any]]
) -> Iterator[Any]:
    """Begin a pass at the position of a checkpoint: skip indices, load the stream's position, or read batches again."""
    assert state.resume_from is not None
    saved, state.resume_from = state.resume_from, None
    loader_pass.position = saved["position"]
    loader_pass.origin, loader_pass.first = saved["origin"], saved["first"]
    if state.indexed:
        loader_pass.skip = loader_pass.position
    elif saved["place"] is not None and state.iterable is not None and loader.num_workers == 0:
        state.iterable.resume_stream(saved["place"])
        with state.replaying(saved["rng"]):  # draws at the beginning were made before the checkpoint was saved
            return _batches(state, loader_pass, begin(loader))
    if state.iterable is not None:
        state.iterable.skip_items(loader_pass.origin)
    num_dropped = loader_pass.position - loader_pass.skip
    if num_dropped and state.index == 0:
        hint = " A stream with state_dict() that is read without workers resumes directly." if state.iterable else ""
        name = plain_class(loader).__name__
        warn_caller(f"{num_dropped} batches of a {name} are read again and dropped, to resume the epoch.{hint}")
    with state.replaying(saved["rng"]):
        iterator = begin(loader)
        for _ in range(num_dropped):
            state.hooks.strategy_next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if loader_pass.next_shares:
                loader_pass.next_shares.popleft()
    return _batches(state, loader_pass, iterator)


def _begin(begin: Callable[[Any], Iterator[Any]], loader: Any) -> Iterator[Any]:
    """Begin a pass; worker processes, if any, do not collect the garbage of this process."""
    if loader.num_workers == 0:
        return begin(loader)
    # A forked worker has a copy of all unreachable objects. If it destroyed one that owns threads, such as a process
    # group of an earlier job, it would wait for threads that it does not have, or crash.
    if gc.get_freeze_count():  # by the user: `unfreeze` would undo that
        gc.collect()
        return begin(loader)
    gc.freeze()
    try:
        return begin(loader)
    finally:
        gc.unfreeze()


def _begin_seeded(state: LoaderState, original: Callable[[Any], Iterator[Any]], loader: Any) -> Iterator[Any]:
    """Begin a pass; worker processes, if any, get a dataset that seeds them for each batch."""
    if loader.num_workers == 0:
        return original(loader)
    dataset = loader.dataset
    state.seeds_workers = True
    # DataLoader refuses assignment to `dataset`; the user's own is restored before the loader is used again.
    object.__setattr__(loader, "dataset", SeededDataset(dataset, loader.collate_fn, state.salts))
    try:
        return original(loader)
    finally:
        object.__setattr__(loader, "dataset", dataset)
        state.seeds_workers = False


def _len(self: Any) -> int:
    state: LoaderState | None = self.__dict__.get(KEY)
    length = functools.partial(plain_class(self).__len__, self)
    if state is None or state.iterable is None:
        return int(length())
    number = int(state.iterable.num_batches(state.training(), length))
    # A hack: torch warns if a stream yields more than the length it noted, and one that repeats samples may follow,
    # which `_batches` leaves out.
    object.__setattr__(self, "_IterableDataset_len_called", number + 1)
    return number


def _batches(state: LoaderState, loader_pass: LoaderPass, iterator: Iterator[Any]) -> Iterator[Any]:
    next_batch = state.hooks.strategy_next_batch
    move = state.hooks.accelerator_move_batch if state.device is not None else None
    state.open(loader_pass)
    state.starting_pass = loader_pass  # a loader class may iterate its sampler only now
    evaluating = False
    iterator = iterator_without_label(iterator)
    steps = EvenSteps(state.hooks, _EXHAUSTED) if isinstance(state.iterable, StreamShards) else None
    try:
        while state.count == 1 and state.iterable is None:  # nothing to weigh, to repeat or to compare
            batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if batch is _EXHAUSTED:
                return
            if move is not None:
                batch = move(batch=batch, device=state.device)
            state.record_batch(loader_pass, batch)
            yield batch
        while True:
            if loader_pass.undecided:
                evaluating = state.is_evaluating(loader_pass)
            if steps is not None and steps.ended:
                batch = _EXHAUSTED  # a loader with worker processes may not be asked again
            elif evaluating:
                # Strategies derive from the gradient mode whether the ranks evaluate, at the end of the loader.
                with torch.no_grad():
                    batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            else:
                batch = next_batch(iterator=iterator, exhausted=_EXHAUSTED)
            if steps is not None and not evaluating and (loader_pass.even or loader_pass.trains):
                batch, share = steps.step(batch)
                loader_pass.next_shares.append(share)
            if batch is _EXHAUSTED:
                return
            if type(batch) is WeightedItem:
                batch, share, window = batch
                loader_pass.next_shares.append(Share(*share))
                if window is not None:
                    state.compare_window(window)
            elif not loader_pass.started and state.iterable is not None and state.iterable.window is not None:
                state.compare_window(state.iterable.window)
            if loader_pass.next_shares and not loader_pass.next_shares[0].weight and state.is_padding(loader_pass):
                continue
            if move is not None:
                batch = move(batch=batch, device=state.device)
            state.record_batch(loader_pass, batch)
            yield batch
    finally:
        state.close(loader_pass)


def adopt_loader(
    loader: DataLoader[Any],
    *,
    hooks: Any,
    device: Any,
    shuffle: Shuffle,
    shard: tuple[int, int],
    training: Callable[[], bool],
    split: bool,
    weigh: bool,
) -> LoaderState:
    """Adopt `loader` in place, and return its state.

    Args:
        device: device to move batches to; None leaves them where they are.
        shard: (index, count) of the data shard of this rank.
        training: returns, when an epoch starts, whether it trains.
        split: whether to divide the samples between the ranks; False leaves the sampler unchanged.
        weigh: whether to weigh uneven last batches by their number of samples.

    Raises:
        OrderError: if it is being read already.
        SettingError: if its sampler divides the data between a different set of ranks.
    """
    index, count = shard
    check_unread(loader)
    state = LoaderState(hooks=hooks, device=device, shuffle=shuffle, training=training, weigh=weigh)
    state.sampling_generators = sampling_generators(loader)
    state.index, state.count = index, count
    # A loader with a ``state_dict`` resumes itself.
    state.resumable = not is_stateful(loader)
    state.loader = weakref.ref(loader)
    state.epoch_setters = epoch_setters(_epoch_candidates(loader))
    if isinstance(loader.dataset, IterableDataset):
        if split:
            _shard_iterable(loader, state, index, count)
    elif split:
        _shard_indices(loader, state, index, count)
    state.indexed = state.sharded and type(loader).__iter__ is DataLoader.__iter__
    state.one_for_one = state.indexed or (state.sharded and not state.resumable)
    state.unbatched = loader.batch_sampler is None
    state.layout = _layout(loader, state, index, count)
    _seed_per_rank(loader, state, index, count)
    namespace: dict[str, Any] = {"__iter__": _iter}
    if isinstance(state.iterable, (SizedShardedBatches, SizedShardedIterable)):
        namespace["__len__"] = _len
    _end_workers(loader)
    adopt(loader, state, namespace)
    return state


def release_loader(loader: DataLoader[Any]) -> None:
    """Restore the loader: its class and replaced attributes."""
    state = release(loader)
    for name, value in state.replaced.items():
        object.__setattr__(loader, name, value)
    for setter in state.epoch_setters:
        setter.release()
    _end_workers(loader)


def _layout(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> Layout:
    """Return the unit of positions in the loader. The kinds are saved in checkpoints: do not change their wording."""
    size, plain = loader.batch_size or 1, type(loader).__iter__ is DataLoader.__iter__
    if not state.resumable:
        return Layout("it keeps its position itself", size, count)
    if not plain:
        return Layout("its __iter__ decides what it reads", size, count)
    if isinstance(state.iterable, StreamShards):
        return Layout("each rank reads its own shards of a stream", size, count, loader.num_workers)
    if state.iterable is not None:
        return Layout("stream", size, count, loader.num_workers)
    if not state.sharded:
        return Layout("the script divides its data itself (use_distributed_sampler=False)", size, count)
    if has_sharded_sampler(loader, index, count):
        return Layout("its sampler divides the data itself", size, count)
    inner = state.replaced["batch_sampler" if loader.batch_sampler is not None else "sampler"]
    return Layout("samples", inner.batch_size, count) if is_flat(inner) else Layout("batches", 1, count)


def _seed_per_rank(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> None:
    """Seed the generators that samples are transformed with differently on each rank."""
    if state.iterable is None:
        generators = transform_generators(loader)
        state.salts = salts(generators)
        # A dataset with ``set_epoch`` may shuffle itself by these generators, which must be equal on all ranks then.
        if loader.num_workers == 0 and not hasattr(loader.dataset, "set_epoch"):
            state.transform_generators = generators
            if index:
                reseed(generators, state.salts, index)
    if loader.num_workers > 0 and (count > 1 or state.iterable is not None):
        worker_init = RankWorkerInit(loader.worker_init_fn, index, loader.collate_fn, state.salts)
        _replace(loader, state, "worker_init_fn", worker_init)


def _replace(loader: Any, state: LoaderState, name: str, value: Any) -> None:
    state.replaced[name] = getattr(loader, name)
    # DataLoader refuses assignment to some attributes after construction; here all code that reads them is known.
    object.__setattr__(loader, name, value)


def _end_workers(loader: Any) -> None:
    """End persistent worker processes: they hold the previous sampler and dataset."""
    if vars(loader).get("_iterator") is not None:
        object.__setattr__(loader, "_iterator", None)


def check_unread(loader: DataLoader[Any]) -> None:
    """Raise if the loader holds an iterator over undivided data.

    Raises:
        OrderError: with the name of the attribute.
    """
    for name, value in vars(loader).items():
        is_torchs = any(klass.__module__ == DataLoader.__module__ for klass in type(value).__mro__)
        if name != "_iterator" and is_torchs and isinstance(value, Iterator):
            raise OrderError(
                f"This {type(loader).__name__} holds in .{name} an iterator over its data that was made before set-up "
                "and is not divided between ranks: make it after lite.setup_dataloaders()."
            )


def _shard_indices(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> None:
    name = "sampler" if loader.batch_sampler is None else "batch_sampler"
    inner = getattr(loader, name)
    state.random_stream = functools.partial(_random_stream, inner, state.shuffle)
    state.sharded = True
    if has_sharded_sampler(loader, index, count):
        index, count = 0, 1
    indices = ShardedIndices(inner, index=index, count=count, begin=state.begin_indices, even=state.training)
    if is_flat(inner) and inner.drop_last and count > 1:
        state.dropped = functools.partial(dropped_text, inner, count)
    _replace(loader, state, name, indices)


def _shard_iterable(loader: DataLoader[Any], state: LoaderState, index: int, count: int) -> None:
    batched = loader.batch_size is not None
    # A loader class with its own __iter__ would see the weights.
    weighted = count > 1 and type(loader).__iter__ is DataLoader.__iter__
    sized = hasattr(type(loader.dataset), "__len__")
    kind = SizedShardedIterable if sized else ShardedIterable
    if isinstance(loader.dataset, Batches):
        kind = SizedShardedBatches if sized else ShardedBatches
    elif reads_shards(loader.dataset, count):
        kind, weighted = StreamShards, False
    state.iterable = kind(
        loader.dataset,
        size=loader.batch_size or 1,
        drop_last=bool(loader.drop_last),
        index=index,
        count=count,
        weighted=weighted,
        shuffle=state.shuffle,
    )
    if loader.num_workers > 0 and loader.persistent_workers:
        state.iterable.share_memory()
    _replace(loader, state, "dataset", state.iterable)
    if weighted:
        _replace(loader, state, "collate_fn", WeightedCollate(loader.collate_fn, batched=batched))


def _random_stream(batches: Any, shuffle: Shuffle, epoch: int) -> RandomStream | None:
    """Return random numbers for a sampler, None if it is known not to draw from the process's generators."""
    source = batches.sampler if is_flat(batches) else batches
    if isinstance(source, (list, tuple, range)) or type(source) is SequentialSampler:
        return None
    is_torchs = type(source).__module__ == torch_samplers.__name__
    if is_torchs and isinstance(getattr(source, "generator", None), torch.Generator):
        return None
    # torch's own samplers draw all numbers before they yield the first index.
    return shuffle.random_stream(epoch, every=not is_torchs)


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """Return the loader's sampler, or its batch sampler and the sampler in it."""
    if isinstance(loader.dataset, IterableDataset):
        return []
    outer = _index_sampler(loader)
    inner = getattr(outer, "sampler", None)
    return [outer] if inner is None else [outer, inner]


def has_sharded_sampler(loader: DataLoader[Any], index: int, count: int) -> bool:
    """Return whether a sampler of the loader divides the data between the ranks, as a ``DistributedSampler`` does.

    Raises:
        SettingError: if it divides the data between a different set of ranks.
    """
    for sampler in _samplers(loader):
        rank, ranks = getattr(sampler, "rank", None), getattr(sampler, "num_replicas", None)
        if not isinstance(sampler, DistributedSampler) and not (isinstance(rank, int) and isinstance(ranks, int)):
            continue
        if (rank, ranks) != (index, count):
            raise SettingError(
                f"This {type(sampler).__name__} reads share {rank} of {ranks}, and this rank is to read share {index} "
                f"of {count}: make it with num_replicas={count} and this rank's rank=, or pass a sampler that does not "
                "divide the data."
            )
        return True
    return False


def _epoch_candidates(loader: DataLoader[Any]) -> list[Any]:
    return [*_samplers(loader), loader.dataset]


def transform_generators(loader: DataLoader[Any]) -> Generators:
    """Return the user's own generators that samples of a map-style loader are transformed with."""
    if isinstance(loader.dataset, IterableDataset):
        return {}
    sampling = {id(generator) for generator in sampling_generators(loader)}
    # In this process, leave the script's globals alone: it may draw numbers from them that must be equal on all ranks.
    module_level = loader.num_workers > 0
    found = find_generators(module_level=module_level, dataset=loader.dataset, collate_fn=loader.collate_fn)
    return {path: generator for path, generator in found.items() if id(generator) not in sampling}


def sampling_generators(loader: DataLoader[Any]) -> list[Any]:
    """Return the user's own generators that determine the samples of a loader and their order."""
    streams = [loader.dataset] if isinstance(loader.dataset, IterableDataset) else []
    generator = [loader.generator] if isinstance(loader.generator, torch.Generator) else []
    found = [*generator, *generator_attributes(*_samplers(loader), *streams)]
    return list({id(each): each for each in found}.values())
