"""Loaders of every type, divided between ranks that are simulated one after another in this process."""

from __future__ import annotations

import copy
import gc
import itertools
import os
import pickle
import random
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
    get_worker_info,
)

from plugframe import OrderError, SettingError
from plugframe.adopt import state_of
from plugframe.data.batch_index import BatchIndex, BatchRecord
from plugframe.data.batch_weights import BatchWeights
from plugframe.data.loader import adopt_loader, release_loader
from plugframe.data.shuffle import Shuffle


class Shuffled:
    """A custom sampler that draws from Python's generator, index by index."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.number))
        while left:
            yield left.pop(random.randrange(len(left)))

    def __len__(self) -> int:
        return self.number


class Buckets:
    """A custom batch sampler with batches of unequal length."""

    def __init__(self) -> None:
        self.epoch = 0
        self.seen: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        self.seen.append(self.epoch)
        yield from ([0], [1, 2], [3, 4, 5], [6], [7, 8])

    def __len__(self) -> int:
        return 5


class Stream(IterableDataset[int]):
    """An iterable dataset that divides itself between workers, as in torch's documentation."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        yield from range(info.id, self.number, info.num_workers) if info else range(self.number)


class Own(DataLoader[Any]):
    """A loader class with its own constructor, attribute, method and ``__iter__``."""

    def __init__(self, number: int, *, tag: str) -> None:
        super().__init__(list(range(number)), batch_size=2)
        self.tag = tag

    def shout(self) -> str:
        return self.tag.upper()

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch + 100


class Noise(Dataset[float]):
    """Random data, drawn when it is read."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> float:
        return torch.rand(()).item()


def hooks() -> SimpleNamespace:
    def next_batch(iterator: Any, exhausted: Any) -> Any:
        return next(iterator, exhausted)

    return SimpleNamespace(strategy_next_batch=next_batch)


def adopt(loader: DataLoader[Any], *, index: int = 0, count: int = 2, training: bool = True, seed: int = 0) -> None:
    adopt_loader(
        loader,
        hooks=hooks(),
        device=None,
        shuffle=Shuffle(seed, 0),
        shard=(index, count),
        training=lambda: training,
        split=True,
        weigh=True,
    )


def divide(make: Any, count: int, *, training: bool = True, epochs: int = 1, seed: int = 3) -> list[list[Any]]:
    """Return the batches of each of `count` ranks in `epochs` epochs of the loader returned by `make`."""
    read = []
    for index in range(count):
        torch.manual_seed(100 + index)  # ranks whose own generators differ
        random.seed(index)
        loader = make()
        adopt(loader, index=index, count=count, training=training, seed=seed)
        batches = []
        for _ in range(epochs):
            expected = len(loader) if not isinstance(loader.dataset, IterableDataset) else None
            epoch = [(torch.as_tensor(batch).tolist(), state_of(loader).weight) for batch in loader]
            assert expected in (None, len(epoch))
            batches += epoch
        read.append(batches)
    return read


def flat(read: list[list[Any]]) -> list[int]:
    return sorted(
        value for rank in read for batch, _ in rank for value in (batch if isinstance(batch, list) else [batch])
    )


DATA = list(range(11))


SAMPLERS = {
    "sequential": lambda: DataLoader(DATA, batch_size=2),
    "shuffled": lambda: DataLoader(DATA, batch_size=2, shuffle=True),
    "generator": lambda: DataLoader(DATA, batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(1)),
    "subset": lambda: DataLoader(DATA, batch_size=2, sampler=SubsetRandomSampler(DATA)),
    "custom": lambda: DataLoader(DATA, batch_size=2, sampler=Shuffled(11)),
    "list": lambda: DataLoader(DATA, batch_size=2, sampler=list(reversed(DATA))),
    "no batches": lambda: DataLoader(DATA, batch_size=None, shuffle=True),
    "batch sampler": lambda: DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 2, False)),
    "sampler of batches": lambda: DataLoader(
        torch.arange(11), batch_size=None, sampler=BatchSampler(SequentialSampler(DATA), 2, False)
    ),
    "workers": lambda: DataLoader(DATA, batch_size=2, shuffle=True, num_workers=1),
    "iterable": lambda: DataLoader(Stream(11), batch_size=2),
    "iterable, no batches": lambda: DataLoader(Stream(11), batch_size=None),
    "iterable, workers": lambda: DataLoader(Stream(11), batch_size=2, num_workers=2),
}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kind", SAMPLERS)
def test_evaluation_reads_every_sample_once(kind: str, count: int) -> None:
    """With any sampler, an evaluation on N ranks reads every sample exactly once (law 8)."""
    assert flat(divide(SAMPLERS[kind], count, training=False)) == DATA


@pytest.mark.parametrize("kind", SAMPLERS)
def test_training_takes_equal_steps_and_weighs_what_is_real(kind: str) -> None:
    """With any sampler, ranks train equal numbers of steps, and batches of weight above 0 cover every sample once."""
    read = divide(SAMPLERS[kind], 3)
    assert len({len(rank) for rank in read}) == 1
    real = [[(batch, weight) for batch, weight in rank if weight > 0] for rank in read]
    assert flat(real) == DATA


@pytest.mark.parametrize("kind", ["shuffled", "custom", "subset", "batch sampler"])
def test_order_does_not_depend_on_the_number_of_ranks(kind: str) -> None:
    """A step of N ranks reads the samples of one process with an N times larger batch."""

    def steps(count: int, size: int) -> list[list[int]]:
        def make() -> DataLoader[Any]:
            loader = SAMPLERS[kind]()
            loader.batch_sampler.batch_size = size
            return loader

        read = divide(make, count, epochs=2)
        return [sorted(v for rank in read for v in rank[step][0] if rank[step][1]) for step in range(len(read[0]))]

    one = steps(1, 4)
    assert steps(2, 2) == one
    assert steps(4, 1) == one
    assert one[:3] != one[3:]  # the second epoch has another order


def test_weighted_samplers_agree_between_ranks() -> None:
    """Ranks of a weighted sampler divide the same draw."""

    def make() -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=2, sampler=WeightedRandomSampler(torch.arange(11.0), 12))

    one = flat(divide(make, 1))
    assert flat(divide(make, 3)) == one
    assert 0 not in one


def test_the_training_generators_are_left_alone() -> None:
    """Shuffling draws no more from the global generators than torch itself does."""
    loader = SAMPLERS["custom"]()
    adopt(loader)
    random.seed(5)
    expected = random.random()
    random.seed(5)
    list(loader)
    assert random.random() == expected


def test_epochs_are_told_and_the_users_own_call_is_respected() -> None:
    """``set_epoch`` is called for every epoch, until the user calls it."""
    sampler = Buckets()
    loader = DataLoader(DATA, batch_sampler=sampler)
    adopt(loader)
    list(loader)
    list(loader)
    assert sampler.seen == [0, 1]
    sampler.set_epoch(7)
    list(loader)
    list(loader)
    assert sampler.seen == [0, 1, 7, 7]
    release_loader(loader)
    assert "set_epoch" not in vars(sampler)


def test_whole_batches_of_a_batch_sampler_are_divided() -> None:
    """Batches of a custom batch sampler are unchanged, and weigh by their number of samples."""
    read = divide(lambda: DataLoader(DATA, batch_sampler=Buckets()), 2)
    assert read[0] == [([0], 2 / 3), ([3, 4, 5], 6 / 4), ([7, 8], 2.0)]
    assert read[1] == [([1, 2], 4 / 3), ([6], 2 / 4), ([7, 8], 0.0)]


def test_a_distributed_sampler_of_the_users_own_is_left_alone() -> None:
    """A sharded loader is not divided again, and its epochs are set."""
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(DATA, batch_size=2, sampler=sampler)
    adopt(loader, index=1)
    assert [batch.tolist() for batch in loader] == [[1, 3], [5, 7], [9, 0]]
    list(loader)
    assert sampler.epoch == 1


def test_a_loader_class_of_the_users_own_keeps_everything() -> None:
    """A loader class keeps its constructor, attributes, methods and ``__iter__``."""
    loader = Own(7, tag="mine")
    dataset = loader.dataset
    adopt(loader, training=False)
    assert isinstance(loader, Own)
    assert loader.shout() == "MINE"
    assert loader.dataset is dataset
    assert [batch.tolist() for batch in loader] == [[100, 102], [104, 106]]
    loader.extra = 1
    release_loader(loader)
    assert type(loader) is Own
    assert loader.extra == 1


@pytest.mark.ranks
def test_workers_of_different_ranks_draw_different_numbers() -> None:
    """Augmentation in workers differs between ranks with equal generators, and is reproducible."""

    def make() -> DataLoader[Any]:
        torch.manual_seed(1)
        return DataLoader(Noise(), batch_size=2, num_workers=1)

    first, second = divide(make, 2), divide(make, 2)
    assert first == second
    assert not {v for batch, _ in first[0] for v in batch} & {v for batch, _ in first[1] for v in batch}


def test_attributes_of_an_iterable_dataset_are_read_and_written_through() -> None:
    """The proxy of an iterable dataset forwards attributes, as ``worker_init_fn`` recipes need."""
    stream = Stream(11)
    loader = DataLoader(stream, batch_size=2)
    adopt(loader, training=False)
    loader.dataset.number = 4
    assert stream.number == 4
    assert [batch.tolist() for batch in loader] == [[0, 2]]
    release_loader(loader)
    assert loader.dataset is stream


class Drawn:
    """A custom sampler that draws all numbers at the beginning."""

    def __init__(self, draw: Any) -> None:
        self.draw = draw

    def __iter__(self) -> Iterator[int]:
        return iter(self.draw())

    def __len__(self) -> int:
        return 11


class Mixed(BatchSampler):
    """Batches of neighbours, in random order."""

    def __iter__(self) -> Iterator[list[int]]:
        batches = list(super().__iter__())
        random.shuffle(batches)
        yield from batches


class RandomStream(IterableDataset[int]):
    """A stream in random order, divided between workers."""

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        index, count = (info.id, info.num_workers) if info else (0, 1)
        left = list(range(index, 11, count))
        random.shuffle(left)
        held = [left.pop() for _ in range(2)]
        while held:
            yield held.pop(int(torch.randint(len(held), ())))
            held += [left.pop() for _ in range(len(left) > 0)]


class SizedStream(Stream):
    """A stream with a length."""

    def __len__(self) -> int:
        return self.number


def _shuffled_by_numpy() -> list[int]:
    numpy = pytest.importorskip("numpy")
    return numpy.random.permutation(11).tolist()  # type: ignore[no-any-return]


RANDOM = {
    "drawn by torch": lambda: DataLoader(DATA, batch_size=2, sampler=Drawn(lambda: torch.randperm(11).tolist())),
    "drawn by Python": lambda: DataLoader(DATA, batch_size=2, sampler=Drawn(lambda: random.sample(DATA, 11))),
    "drawn by NumPy": lambda: DataLoader(DATA, batch_size=2, sampler=Drawn(_shuffled_by_numpy)),
    "batches": lambda: DataLoader(DATA, batch_sampler=Mixed(SequentialSampler(DATA), 2, False)),
    "batches of a generator": lambda: DataLoader(
        DATA, batch_sampler=Mixed(RandomSampler(DATA, generator=torch.Generator().manual_seed(0)), 2, False)
    ),
    "stream": lambda: DataLoader(RandomStream(), batch_size=2),
    "stream, workers": lambda: DataLoader(RandomStream(), batch_size=2, num_workers=2),
    "stream, no batches": lambda: DataLoader(RandomStream(), batch_size=None),
}


@pytest.mark.parametrize("kind", RANDOM)
def test_whatever_draws_the_order_ranks_agree_on_it(kind: str) -> None:
    """Samplers, batch samplers and streams that draw from any global generator, at any time, are divided exactly."""
    read = divide(RANDOM[kind], 2, training=False, epochs=2)
    number = len(read[0]) // 2
    first = [rank[:number] if "stream" not in kind else rank for rank in read]
    assert flat(read) == sorted(DATA * 2)
    if "stream" not in kind:
        assert flat(first) == DATA


def test_every_epoch_has_an_order_of_its_own() -> None:
    """Passes begun together, in sequence, or within one pass of an endless loader have different orders."""

    class Endless(DataLoader[Any]):
        """A loader that restarts by itself."""

        def __iter__(self) -> Iterator[Any]:
            while True:
                yield from super().__iter__()

    for loader in (DataLoader(DATA, shuffle=True), DataLoader(RandomStream()), Endless(DATA, shuffle=True)):
        adopt(loader, count=1)
        pairs = [pair for pair, _ in zip(zip(loader, loader, strict=False), DATA, strict=False)]
        orders = [[int(pair[side]) for pair in pairs] for side in (0, 1)]
        passes = iter(loader)
        orders += [[int(next(passes)) for _ in DATA]]
        if isinstance(loader, Endless):
            orders += [[int(next(passes)) for _ in DATA]]
        assert [sorted(order) for order in orders] == [DATA] * len(orders)
        assert len({tuple(order) for order in orders}) == len(orders)


def test_weights_belong_to_the_pass_that_is_read() -> None:
    """A nested pass, and one that is dropped later, do not change the current weight."""
    loader = DataLoader(list(range(5)), batch_size=2)
    adopt(loader)
    state = state_of(loader)
    expected = [state.weight for _ in loader]
    assert expected == [1.0, 2.0]
    seen = []
    for _ in loader:
        inner = iter(loader)
        next(inner)
        list(loader)
        del inner
        seen.append(state.weight)
    assert seen == expected
    assert state.weight is None
    abandoned = iter(loader)
    next(abandoned)
    current = iter(loader)
    next(current)
    del abandoned
    assert state.weight == 1.0


@pytest.mark.parametrize(("training", "count"), [(True, 1), (False, 1), (True, 2)])
def test_nothing_is_read_ahead(training: bool, count: int) -> None:
    """Samplers and streams are read up to the current batch only: they may depend on the training."""
    drawn: list[int] = []

    class Adaptive(IterableDataset[int]):
        """A stream and a sampler that record how far they were read."""

        def __len__(self) -> int:
            return 8

        def __iter__(self) -> Iterator[int]:
            for index in range(8):
                drawn.append(index)
                yield index

    for loader in (DataLoader(DATA, batch_size=2, sampler=Adaptive()), DataLoader(Adaptive(), batch_size=2)):
        drawn.clear()
        adopt(loader, count=count, training=training)
        next(iter(loader))
        assert len(drawn) == 2 * count


@pytest.mark.ranks
def test_workers_that_stay_know_what_changes() -> None:
    """Persistent workers follow set-up, evaluation, each epoch and tear-down."""
    mode = [True]
    loader: DataLoader[Any] = DataLoader(RandomStream(), batch_size=2, num_workers=1, persistent_workers=True)
    list(loader)
    adopt_loader(
        loader,
        hooks=hooks(),
        device=None,
        shuffle=Shuffle(0, 0),
        shard=(2, 3),
        training=lambda: mode[0],
        split=True,
        weigh=True,
    )
    trained = [batch.tolist() for batch in loader]
    assert len(trained) == 2
    again = [batch.tolist() for batch in loader]
    assert trained != again
    mode[0] = False
    assert len([value for batch in loader for value in batch.tolist()]) == 3
    release_loader(loader)
    assert sorted(value for batch in loader for value in batch.tolist()) == DATA
    release = loader._iterator  # the workers go with it, and with them what the test has started
    loader._iterator = None
    del release


def test_lengths_are_those_of_the_loaders_class() -> None:
    """``len`` of a loader counts divided batches by its class; ``len`` of the data is unchanged."""

    class Short(DataLoader[Any]):
        """A loader of at most two batches."""

        def __iter__(self) -> Iterator[Any]:
            return itertools.islice(super().__iter__(), 2)

        def __len__(self) -> int:
            return min(2, super().__len__())

    for index, training, size in itertools.product((0, 1, 2), (True, False), (2, 3, None)):
        loader = DataLoader(SizedStream(11), batch_size=size)
        adopt(loader, index=index, count=3, training=training)
        assert len(loader) == len(list(loader))
        assert len(loader.dataset) == 11
        short = Short(SizedStream(11) if training else DATA, batch_size=size)
        adopt(short, index=index, count=3, training=training)
        assert len(short) == len(list(short))
    unsized = DataLoader(Stream(11))
    adopt(unsized)
    with pytest.raises(TypeError, match="has no len"):
        len(unsized)
    assert unsized.dataset


def test_stand_ins_pass_for_the_users_objects() -> None:
    """Proxies are instances of the user's classes, and accept attributes."""
    loader, stream = DataLoader(DATA, batch_size=2), DataLoader(SizedStream(11), batch_size=2)
    adopt(loader, count=1)
    adopt(stream)
    assert isinstance(loader.batch_sampler, BatchSampler)
    assert isinstance(stream.dataset, SizedStream)
    loader.batch_sampler.batch_size = 4
    assert len(loader) == len(list(loader)) == 3
    assert len(pickle.loads(pickle.dumps(stream.dataset))) == 11
    assert stream.collate_fn([1, 2]).tolist() == [1, 2]


def test_weights_count_samples_of_any_kind_of_batch() -> None:
    """Batches of indices may be tensors, and an index may be a string."""

    class Tensors:
        """A batch sampler that yields tensors."""

        def __iter__(self) -> Iterator[torch.Tensor]:
            yield from (torch.tensor([0, 1, 2]), torch.tensor([3]))

    class Named(Dataset[str]):
        """Data by name."""

        def __getitem__(self, name: Any) -> str:
            return str(name)

    kinds = {
        (1.5, 0.5): lambda: DataLoader(DATA, batch_sampler=Tensors()),
        (1.0, 1.0): lambda: DataLoader(Named(), batch_size=None, sampler=["long", "s"]),
    }
    for expected, make in kinds.items():
        weights = []
        for index in (0, 1):
            loader = make()
            adopt(loader, index=index)
            weights += [state_of(loader).weight for _ in loader]
        assert tuple(weights) == expected


class Told(Dataset[int]):
    """A dataset and sampler with ``set_epoch`` and without ``epoch``."""

    def __init__(self) -> None:
        self.told: list[int] = []

    def set_epoch(self, epoch: int) -> None:
        self.told.append(epoch)

    def __getitem__(self, index: int) -> int:
        return index

    def __iter__(self) -> Iterator[int]:
        return iter(range(4))

    def __len__(self) -> int:
        return 4


@pytest.mark.parametrize("make", [lambda told: DataLoader(told), lambda told: DataLoader(DATA, sampler=told)])
def test_what_is_told_the_epoch_stays_the_users(make: Any) -> None:
    """Without an ``epoch`` attribute, the user's calls are detected; copies and pickles are plain."""
    told = Told()
    loader, other = make(told), make(told)
    adopt(loader, count=1)
    adopt(other, count=1)
    list(loader)
    list(loader)
    twin = copy.deepcopy(told)
    twin.set_epoch(9)
    assert type(twin) is type(pickle.loads(pickle.dumps(told))) is Told
    assert len(list(pickle.loads(pickle.dumps(loader)))) == 4
    assert told.told == [0, 1]
    told.set_epoch(7)
    list(loader)
    list(other)
    assert told.told == [0, 1, 7]
    release_loader(loader)
    assert type(told) is not Told
    release_loader(other)
    assert type(told) is Told
    assert list(vars(told)) == ["told"]


def test_an_epoch_that_does_not_begin_at_zero_is_told() -> None:
    """A sampler with another initial ``epoch`` is set to every epoch too."""
    sampler = Buckets()
    sampler.epoch = -1
    loader = DataLoader(DATA, batch_sampler=sampler)
    adopt(loader)
    list(loader)
    list(loader)
    assert sampler.seen == [0, 1]


def test_a_sampler_that_divides_by_itself_is_known_by_its_attributes() -> None:
    """A sampler with ``num_replicas`` and ``rank`` is taken as sharded, and must match these ranks."""

    class Foreign:
        """A distributed sampler of another package."""

        def __init__(self, rank: int, num_replicas: int) -> None:
            self.rank = rank
            self.num_replicas = num_replicas

        def __iter__(self) -> Iterator[int]:
            return iter(range(self.rank, 8, self.num_replicas))

        def __len__(self) -> int:
            return 4

    loader = DataLoader(DATA, batch_size=2, sampler=Foreign(1, 2))
    adopt(loader, index=1)
    assert [batch.tolist() for batch in loader] == [[1, 3], [5, 7]]
    for sampler in (Foreign(0, 3), DistributedSampler(DATA, num_replicas=1, rank=0)):
        with pytest.raises(SettingError, match=r"reads share 0 of \d, and this rank is to read share 1 of 2: make it"):
            adopt(DataLoader(DATA, sampler=sampler), index=1)


def test_a_pass_begun_before_set_up_is_refused() -> None:
    """A loader that holds an iterator over undivided data would give every rank all of it."""

    class Endless(DataLoader[Any]):
        """A loader that makes its only iterator in the constructor."""

        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.current = super().__iter__()

    with pytest.raises(OrderError, match=r"This Endless holds in .current an iterator over its data that was"):
        adopt(Endless(DATA))


class Unreachable:
    """An object in a reference cycle, which notes the process that finalises it in a file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.cycle = self

    def __del__(self) -> None:
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")


class Collecting(Dataset[int]):
    """A dataset that has garbage collected in the worker process."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


@pytest.mark.ranks
@pytest.mark.parametrize("frozen", [False, True])
def test_workers_do_not_collect_garbage_of_the_rank(tmp_path: Path, frozen: bool) -> None:
    """Destroying a copy of an object that owns threads waits for threads that a forked worker does not have."""
    loader = DataLoader(Collecting(), num_workers=1, multiprocessing_context="fork")
    adopt(loader, index=0, count=1)
    gc.unfreeze()
    if frozen:
        gc.freeze()  # as a script does, which is to stay so
    gc.disable()
    try:
        Unreachable(tmp_path / "finalised")
        assert len(list(loader)) == 2
        assert (gc.get_freeze_count() > 0) is frozen
        gc.collect()
    finally:
        gc.enable()
        gc.unfreeze()
    assert (tmp_path / "finalised").read_text() == f"{os.getpid()}\n"


def test_the_counter_of_collectives_is_dropped_at_tear_down() -> None:
    """It is a method of the process group, which would live on with it."""
    weights = BatchWeights()
    weights.num_collectives = lambda: 0
    weights.clear()
    assert weights.num_collectives is None


def test_the_index_of_batches_does_not_grow() -> None:
    """Batches that are freed leave nothing in it, also where the next one gets the same addresses."""
    index = BatchIndex()
    for _ in range(1000):
        index.add(torch.zeros(2), BatchRecord(1.0, loader_pass=None))  # type: ignore[arg-type]
    assert len(index._objects) <= 10
    assert sum(map(len, index._storages.values())) <= 10
