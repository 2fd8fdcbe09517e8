"""Loaders of every kind, divided between ranks; the ranks are played one after another in this process."""

from __future__ import annotations

import random
from collections.abc import Iterator
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

from plugframe.adopt import Order, adopt_loader, release_loader, state_of


class Shuffled:
    """A sampler of the user's own that draws from Python's generator, index by index."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        left = list(range(self.number))
        while left:
            yield left.pop(random.randrange(len(left)))

    def __len__(self) -> int:
        return self.number


class Buckets:
    """A batch sampler of the user's own, with batches of unequal length."""

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
    """An iterable dataset that divides itself between workers, as torch's documentation says."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[int]:
        info = get_worker_info()
        yield from range(info.id, self.number, info.num_workers) if info else range(self.number)


class Own(DataLoader[Any]):
    """A loader class with a constructor, an attribute, a method and an ``__iter__`` of its own."""

    def __init__(self, number: int, *, tag: str) -> None:
        super().__init__(list(range(number)), batch_size=2)
        self.tag = tag

    def shout(self) -> str:
        return self.tag.upper()

    def __iter__(self) -> Iterator[Any]:
        for batch in super().__iter__():
            yield batch + 100


class Noise(Dataset[float]):
    """Data that is drawn at random when it is read."""

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
        order=Order(seed, 0),
        shard=(index, count),
        training=lambda: training,
        split=True,
        weigh=True,
    )


def divide(make: Any, count: int, *, training: bool = True, epochs: int = 1, seed: int = 3) -> list[list[Any]]:
    """Return what each of `count` ranks reads in `epochs` epochs of the loader that `make` makes."""
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
    """Whatever the sampler, an evaluation over N ranks reads every sample exactly once (law 8)."""
    assert flat(divide(SAMPLERS[kind], count, training=False)) == DATA


@pytest.mark.parametrize("kind", SAMPLERS)
def test_training_takes_equal_steps_and_weighs_what_is_real(kind: str) -> None:
    """Whatever the sampler, ranks train equal numbers of steps, and batches that weigh cover every sample once."""
    read = divide(SAMPLERS[kind], 3)
    assert len({len(rank) for rank in read}) == 1
    real = [[(batch, weight) for batch, weight in rank if weight > 0] for rank in read]
    assert flat(real) == DATA


@pytest.mark.parametrize("kind", ["shuffled", "custom", "subset", "batch sampler"])
def test_order_does_not_depend_on_the_number_of_ranks(kind: str) -> None:
    """A step of N ranks reads the samples of one process whose batch is N times as large."""

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
    """Ranks of a weighted sampler divide one and the same draw."""

    def make() -> DataLoader[Any]:
        return DataLoader(DATA, batch_size=2, sampler=WeightedRandomSampler(torch.arange(11.0), 12))

    one = flat(divide(make, 1))
    assert flat(divide(make, 3)) == one
    assert 0 not in one


def test_the_training_generators_are_left_alone() -> None:
    """Drawing an order takes nothing from the generators the training draws from, but what torch itself takes."""
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
    """The batches of a user's batch sampler stay as they are, and weigh by their samples."""
    read = divide(lambda: DataLoader(DATA, batch_sampler=Buckets()), 2)
    assert read[0] == [([0], 2 / 3), ([3, 4, 5], 6 / 4), ([7, 8], 2.0)]
    assert read[1] == [([1, 2], 4 / 3), ([6], 2 / 4), ([7, 8], 0.0)]


def test_a_distributed_sampler_of_the_users_own_is_left_alone() -> None:
    """A loader that is divided already is not divided again, and its epochs are set."""
    sampler = DistributedSampler(DATA, num_replicas=2, rank=1, shuffle=False)
    loader = DataLoader(DATA, batch_size=2, sampler=sampler)
    adopt(loader, index=1)
    assert [batch.tolist() for batch in loader] == [[1, 3], [5, 7], [9, 0]]
    list(loader)
    assert sampler.epoch == 1


def test_a_loader_class_of_the_users_own_keeps_everything() -> None:
    """A loader with its own constructor, attributes, methods and ``__iter__`` keeps them, divided."""
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


def test_workers_of_different_ranks_draw_different_numbers() -> None:
    """Augmentation in workers differs between ranks whose generators are equal, and repeats from run to run."""

    def make() -> DataLoader[Any]:
        torch.manual_seed(1)
        return DataLoader(Noise(), batch_size=2, num_workers=1)

    first, second = divide(make, 2), divide(make, 2)
    assert first == second
    assert not {v for batch, _ in first[0] for v in batch} & {v for batch, _ in first[1] for v in batch}


def test_attributes_of_an_iterable_dataset_are_read_and_written_through() -> None:
    """What stands in for an iterable dataset is transparent, as ``worker_init_fn`` recipes need."""
    stream = Stream(11)
    loader = DataLoader(stream, batch_size=2)
    adopt(loader, training=False)
    loader.dataset.number = 4
    assert stream.number == 4
    assert [batch.tolist() for batch in loader] == [[0, 2]]
    release_loader(loader)
    assert loader.dataset is stream
