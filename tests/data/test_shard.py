"""Sharding of samples: every sample once, and the same global batches for any number of ranks."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import BatchSampler

from plugframe.data.sharding import PassStart, ShardedIndices, share_batches, share_indices

numbers = st.integers(0, 60)
sizes = st.integers(1, 5)
ranks = st.integers(1, 5)


def taker(items: Any) -> Callable[[int], list[Any]]:
    iterator = iter(items)
    return lambda number: list(itertools.islice(iterator, number))


def shares(number: int, size: int, count: int, *, drop_last: bool, even: bool) -> list[list[Any]]:
    return [
        list(share_indices(taker(range(number)), size=size, drop_last=drop_last, index=index, count=count, even=even))
        for index in range(count)
    ]


def stand_in(sampler: Any, *, index: int, count: int, even: bool) -> ShardedIndices:
    def start() -> PassStart:
        return PassStart(random_stream=None, even=even, add_share=lambda share: None, skip=0)

    return ShardedIndices(sampler, index=index, count=count, begin=lambda: start, even=lambda: even)


@given(numbers, sizes, ranks)
def test_training_steps_are_even_and_weighted_by_samples(number: int, size: int, count: int) -> None:
    """In training all ranks take equal steps, and the weighted samples of a step are one process's batch."""
    split = shares(number, size, count, drop_last=False, even=True)
    whole = [list(range(start, min(start + size * count, number))) for start in range(0, number, size * count)]
    assert {len(share) for share in split} == {len(whole)}
    for step, batch in enumerate(whole):
        read = [index for share in split for index in share[step][0] if share[step][1].weight > 0]
        assert sorted(read) == batch
        assert all(share[step][0] for share in split)
        for share in split:
            indices, (weight, *_) = share[step]
            assert weight == 0 or abs(weight - len(indices) * count / len(batch)) < 1e-12


@given(numbers, sizes, ranks)
def test_evaluation_reads_every_sample_exactly_once(number: int, size: int, count: int) -> None:
    """In evaluation every sample is read once, with equal steps unless there are too few samples."""
    split = shares(number, size, count, drop_last=False, even=False)
    read = [index for share in split for indices, _ in share for index in indices]
    assert sorted(read) == list(range(number))
    steps = {len(share) for share in split}
    assert max(steps) - min(steps) <= 1
    if size > 1 and number >= size * count:
        assert len(steps) == 1


@given(numbers, sizes, ranks)
def test_drop_last_leaves_only_full_batches(number: int, size: int, count: int) -> None:
    """With drop_last every batch is full, on every rank."""
    for even in (True, False):
        split = shares(number, size, count, drop_last=True, even=even)
        assert {len(share) for share in split} == {number // (size * count)}
        assert all(len(indices) == size and part.weight == 1 for share in split for indices, part in share)


@given(numbers, sizes, ranks, st.booleans(), st.booleans())
def test_length_is_the_number_of_batches(number: int, size: int, count: int, drop_last: bool, even: bool) -> None:
    """``len`` of a divided loader is the number of batches it yields."""
    for index in range(count):
        sampler = BatchSampler(range(number), size, drop_last)
        sharded = stand_in(sampler, index=index, count=count, even=even)
        assert len(sharded) == len(list(sharded))


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=4), max_size=20), ranks)
def test_batches_of_a_sampler_of_the_users_own_stay_whole(batches: list[list[int]], count: int) -> None:
    """A custom batch sampler is divided by complete batches; weights are by samples."""
    split = [list(share_batches(taker(batches), index=i, count=count, even=True)) for i in range(count)]
    assert {len(share) for share in split} == {-(-len(batches) // count)}
    for step, start in enumerate(range(0, len(batches), count)):
        window = batches[start : start + count]
        real = [share[step] for share in split if share[step][1].weight > 0]
        assert [batch for batch, _ in real] == window
        assert abs(sum(part.weight for _, part in real) - count) < 1e-9


@given(numbers, sizes, ranks, st.booleans(), st.booleans())
def test_shares_have_the_positions_of_one_process(number: int, size: int, count: int, even: bool, halve: bool) -> None:
    """The positions in the shares put the samples of each step in the order of one process."""
    parts = [
        list(
            share_indices(
                taker(range(number)), size=size, drop_last=False, index=i, count=count, even=even, pad=lambda: True
            )
        )
        if halve
        else list(
            share_batches(
                taker(BatchSampler(range(number), size, False)), index=i, count=count, even=even, pad=lambda: True
            )
        )
        for i in range(count)
    ]
    read = []
    for step in zip(*parts, strict=True):
        pairs = [
            (part.start + i * part.step, sample)
            for batch, part in step
            for i, sample in enumerate(batch)
            if part.weight
        ]
        assert all(len(batch) == part.size for batch, part in step)
        read += [sample for _, sample in sorted(pairs)]
        assert all(part.partial for _, part in step if part.weight) == any(not part.weight for _, part in step)
    assert read == list(range(number))


def test_other_attributes_are_the_users_sampler() -> None:
    """The proxy of a batch sampler forwards its attributes."""
    sampler = BatchSampler(range(10), 2, False)
    sharded = stand_in(sampler, index=0, count=2, even=True)
    assert isinstance(sharded, BatchSampler)
    assert sharded.batch_size == 2
    sharded.batch_size = 5
    assert sampler.batch_size == 5
    assert len(sharded) == 1
    assert type(copy.deepcopy(sharded)) is BatchSampler
    assert sharded.sampler == range(10)
