"""Evaluations read each sample once, however scripts evaluate; data that differs between ranks is refused."""

from __future__ import annotations

import itertools
import random
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset, random_split

from plugframe import Lite, OrderError, PlugframeWarning, SettingError
from plugframe.hooks.world import World
from ranks import run_checks

STRATEGIES = ("ddp", "fsdp")


@contextmanager
def ranks(world: World) -> Iterator[World]:
    torch.manual_seed(0)
    yield world


@contextmanager
def job(world: World, strategy: str = "ddp") -> Iterator[Any]:
    with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size) as lite:
        lite.launch()
        yield lite


class Numbers(IterableDataset[Tensor]):
    """A stream of numbers."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(float(self.number))[:, None])


def loaders(number: int) -> list[DataLoader[Any]]:
    data = torch.arange(float(number))[:, None]
    batches = [list(range(at, min(at + 2, number))) for at in range(0, number, 2)]
    return [
        DataLoader(data, batch_size=2),
        DataLoader(data, batch_size=2, shuffle=True),
        DataLoader(data, batch_sampler=batches),
        DataLoader(Numbers(number), batch_size=2),
        DataLoader(data, batch_size=2, num_workers=1),
    ]


def each_sample_is_evaluated_once(world: World) -> None:
    """Without gradients in the loop, in inference mode, with one of two models in eval mode, or with gradients."""
    ways: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
        "none in eval": (nullcontext, torch.no_grad, ()),
        "inference": (nullcontext, torch.inference_mode, ()),
        "one in eval": (nullcontext, torch.no_grad, (0,)),
        "one in eval, with gradients": (nullcontext, nullcontext, (0,)),
        "all in eval, with gradients": (nullcontext, nullcontext, (0, 1)),
        "outside": (torch.no_grad, nullcontext, ()),
    }
    for strategy in STRATEGIES:
        with job(world, strategy) as lite:
            models = [lite.setup(nn.Linear(1, 1)) for _ in range(2)]
            for number in (9, 11) if strategy == "ddp" else (9,):
                for loader in lite.setup_dataloaders(*loaders(number)):
                    for way, (outside, inside, evals) in ways.items():
                        seen = []
                        for at, model in enumerate(models):
                            model.train(at not in evals)
                        with outside():
                            for x in loader:
                                with inside():
                                    models[0](x)
                                seen += x.flatten().tolist()
                        everyone = lite._hooks.collective_all_gather_object(obj=seen, group=None)
                        assert sorted(itertools.chain(*everyone)) == list(range(number)), (
                            strategy,
                            way,
                            loader,
                            everyone,
                        )


def training_keeps_its_steps(world: World) -> None:
    """All ranks take equal training steps: with evaluations in between, accumulated, read ahead, in evaluation mode."""
    with job(world) as lite:
        model = nn.Linear(1, 1)
        model = lite.setup(model)
        for loader in lite.setup_dataloaders(*loaders(9)):
            for evaluation, accumulate, source in itertools.product((False, True), (False, True), (iter, list)):
                for training in (True, True, False, False):
                    # In evaluation mode a backward must say that it trains, before the last indices are drawn.
                    if not training and (loader.num_workers or accumulate or source is list):
                        continue
                    model.train(training)
                    steps, loss = 0, torch.zeros(())
                    for x in source(loader):
                        steps += 1
                        loss = model(x).mean() + (loss if accumulate else 0)
                        if evaluation and steps == 2:
                            with torch.no_grad():
                                for y in loader:
                                    model(y)
                            lite.all_reduce(1.0)
                        if not accumulate:
                            lite.backward(loss)
                    if accumulate:
                        lite.backward(loss)
                    assert lite._hooks.collective_all_gather_object(obj=steps, group=None) == [3, 3]


def a_loop_that_exchanges_for_every_batch_is_refused(world: World) -> None:
    """Collectives for every batch would hang if one rank has no batch left."""
    with job(world) as lite:
        model = lite.setup(nn.Linear(1, 1))
        loader = lite.setup_dataloaders(DataLoader(torch.arange(9.0)[:, None], batch_size=2))
        exchanges: tuple[Callable[[], Any], ...] = (
            lambda: lite.all_reduce(1.0, reduce_op="sum"),
            lambda: dist.all_reduce(torch.ones(1)),
        )

        def evaluate(exchange: Callable[[], Any]) -> None:
            for at, x in enumerate(loader):
                with torch.no_grad():
                    model(x)
                if at < 2:
                    exchange()

        for exchange in exchanges:
            refused = pytest.raises(OrderError, match="Turn gradients off before the loop")
            with refused if world.global_rank else nullcontext():
                evaluate(exchange)


def what_cannot_be_known_is_told(world: World) -> None:
    """Repeated samples in a result, and results that were not reduced, are warned of once; nothing else is."""
    with job(world) as lite:
        model = lite.setup(nn.Linear(1, 1))
        loader = lite.setup_dataloaders(DataLoader(torch.arange(9.0)[:, None], batch_size=2))

        def told(*exchanges: Callable[[], Any]) -> list[str]:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always", PlugframeWarning)
                with torch.no_grad():
                    for x in loader:
                        model(x)
                for exchange in exchanges:
                    exchange()
                for x in loader:
                    lite.backward(model(x).mean())
            return [str(warning.message) for warning in caught]

        assert told(lambda: lite.all_reduce(1.0)) == []
        assert told(lambda: dist.all_reduce(torch.ones(1))) == []
        assert told(lambda: lite.all_gather(1.0)) == []
        alone = told()
        assert [text.startswith("A loader that is divided between ranks was evaluated") for text in alone] == (
            [] if world.global_rank else [True]
        )
        assert told() == []
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", PlugframeWarning)
            for x in loader:
                model(x)
            lite.all_reduce(1.0)
            for _ in range(2):
                number = sum(len(x) for x in loader)
            lite.all_reduce(number, reduce_op="sum")
            assert len(list(loader)) == 3
            kept = list(loader)
            lite.all_reduce(1.0)
            assert len(kept) == 3
        twice = "The last batch of a loader on this rank repeats samples"
        assert [str(each.message)[: len(twice)] for each in caught] == ([twice, twice] if world.global_rank else [])


class Folder(Dataset[int]):
    """Files of a folder in directory order, with a cache."""

    def __init__(self, names: list[str]) -> None:
        self.names = names
        self.cache: list[Any] = [None] * len(names)
        self.read = 0

    def __getitem__(self, index: int) -> int:
        self.read += 1
        self.cache[index] = index
        return index

    def __len__(self) -> int:
        return len(self.names)


class Augmented(Dataset[Tensor]):
    """Data that differs each time it is read."""

    def __init__(self) -> None:
        self.labels = list(range(8))

    def __getitem__(self, index: int) -> Tensor:
        return torch.rand(2) + index

    def __len__(self) -> int:
        return 8


def data_that_differ_are_refused(world: World) -> None:
    rank = world.global_rank
    torch.manual_seed(rank)
    everything = TensorDataset(torch.arange(40.0))
    different: dict[str, Callable[[], DataLoader[Any]]] = {
        r"Subset\.indices on rank 1": lambda: DataLoader(random_split(everything, [30, 10])[0]),
        r"number of samples of the Subset is 10 on rank 0 and 11 on rank 1": lambda: DataLoader(
            Subset(everything, range(10 + rank))
        ),
        r"TensorDataset\.tensors": lambda: DataLoader(TensorDataset(torch.randn(9, 2))),
        r"Folder\.names": lambda: DataLoader(Folder([f"/data/{(at + rank) % 5}.png" for at in range(5)])),
        r"list on rank 1": lambda: DataLoader(list(range(rank, 16, 2))),
        r"batch_size is 2 on rank 0 and 3 on rank 1": lambda: DataLoader(list(range(8)), batch_size=2 + rank),
        r"SubsetRandomSampler\.indices": lambda: DataLoader(
            everything, sampler=torch.utils.data.SubsetRandomSampler(torch.randperm(40).tolist()[:20])
        ),
    }
    with job(world) as lite:
        for match, make in different.items():
            with pytest.raises(SettingError, match=f"{match}.*use_distributed_sampler=False"):
                lite.setup_dataloaders(make())
            lite.setup_dataloaders(make(), use_distributed_sampler=False)


def data_that_are_alike_are_not(world: World) -> None:
    """Augmented data, different folders per node, and caches with different contents are not reported."""
    rank = world.global_rank
    torch.manual_seed(rank)
    random.seed(rank)
    with job(world) as lite:
        folder = Folder([f"/scratch/{rank}/{at}.png" for at in range(5)])
        for _ in range(2):
            loader = lite.setup_dataloaders(DataLoader(folder))
            read = folder.read
            list(loader)
        assert read == 3 - rank  # nothing is read by set-up
        lite.setup_dataloaders(
            DataLoader(Augmented(), shuffle=True), DataLoader(torch.utils.data.ConcatDataset([Augmented(), folder]))
        )


class Divided(IterableDataset[int]):
    """A stream that shards itself by rank."""

    def __init__(self, worker_too: bool = False) -> None:
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 16, self.ranks))


class AsHuggingFace(IterableDataset[int]):
    """A stream with the attributes of a split Hugging Face dataset."""

    class Distributed:
        """The distributed attributes of a Hugging Face dataset."""

        rank, world_size = 0, 2

    def __init__(self) -> None:
        self._distributed = self.Distributed()

    def __iter__(self) -> Iterator[int]:
        return iter(range(16))


def split_by_node(source: Any) -> Any:
    return source


class AsWebDataset(IterableDataset[int]):
    """A pipeline of stages."""

    def __init__(self) -> None:
        self.pipeline = [range(16), split_by_node]

    def __iter__(self) -> Iterator[int]:
        return iter(range(16))


class Shuffling(IterableDataset[Any]):
    """A stream that draws from Python's generator, with noise from a hidden generator."""

    def __iter__(self) -> Iterator[Any]:
        noise = random.SystemRandom()
        for index in random.sample(range(16), 16):
            yield index, noise.random()


def streams_that_divide_themselves_are_refused(world: World) -> None:
    random.seed(world.global_rank)
    with job(world) as lite:
        for stream, match in ((AsHuggingFace(), "split_dataset_by_node"), (AsWebDataset(), "split_by_node")):
            with pytest.raises(SettingError, match=f"is divided between ranks already, by .*{match}.*use_distributed"):
                lite.setup_dataloaders(DataLoader(stream))
            lite.setup_dataloaders(DataLoader(stream), use_distributed_sampler=False)
        for workers in (0, 1):
            alike = lite.setup_dataloaders(DataLoader(Shuffling(), batch_size=2, num_workers=workers))
            assert len(list(alike)) == len(list(alike)) == 4
            loader = lite.setup_dataloaders(DataLoader(Divided(), batch_size=2, num_workers=workers))
            outcome = ""
            try:
                list(loader)
            except SettingError as error:
                outcome = str(error)
            outcomes = lite._hooks.collective_all_gather_object(obj=outcome, group=None)
            assert any("read different samples at the beginning of a stream" in each for each in outcomes)
            kept = lite.setup_dataloaders(
                DataLoader(Divided(), batch_size=2, num_workers=workers), use_distributed_sampler=False
            )
            assert len(list(kept)) == 4


CHECKS = (
    each_sample_is_evaluated_once,
    training_keeps_its_steps,
    a_loop_that_exchanges_for_every_batch_is_refused,
    what_cannot_be_known_is_told,
    data_that_differ_are_refused,
    data_that_are_alike_are_not,
    streams_that_divide_themselves_are_refused,
)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_checks(2, ranks, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_evaluating(check: Any, failures: dict[str, str]) -> None:
    """Each sample is evaluated once, training steps are equal, and data that differs between ranks is refused."""
    assert not failures[check.__name__], failures[check.__name__]
