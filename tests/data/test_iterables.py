"""Loaders that are no DataLoader, and batches that move themselves."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from plugframe import Lite, SettingError, SettingTypeError, World
from plugframe.data.sharded_batches import num_samples
from plugframe.utils.movable import map_data, move_data
from ranks import run_ranks


class Numbers:
    """Batches of consecutive numbers, a small one at the end; each epoch begins at another number."""

    def __init__(self, sizes: tuple[int, ...] = (2, 2, 2, 2, 1)) -> None:
        self.sizes = sizes
        self.start = 0.0

    def set_epoch(self, epoch: int) -> None:
        self.start = 100.0 * epoch

    def __len__(self) -> int:
        return len(self.sizes)

    def __iter__(self) -> Iterator[Tensor]:
        start = self.start
        for size in self.sizes:
            yield torch.arange(start, start + size)[:, None]
            start += size


class WebLoader(IterableDataset[Any]):
    """A pipeline that begins with a loader, as webdataset's."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self.pipeline = [loader]

    def __iter__(self) -> Iterator[Any]:
        for batch in self.pipeline[0]:
            yield batch[0]


def lite_on(num_ranks: int) -> Lite:
    return Lite(accelerator="cpu", devices=num_ranks)


def test_one_rank_reads_an_iterable_as_it_is() -> None:
    """On one rank nothing is divided; the object is the user's, and plain again after tear-down."""
    numbers = Numbers()
    with lite_on(1) as lite:
        assert lite.setup_dataloaders(numbers) is numbers
        assert isinstance(numbers, Numbers)
        assert len(numbers) == 5
        assert torch.cat(list(numbers)).flatten().tolist() == list(range(9))
        assert next(iter(numbers))[0].item() == 100.0  # the next epoch
        numbers.set_epoch(3)
        assert next(iter(numbers))[0].item() == 300.0
        assert type(copy.deepcopy(numbers)) is Numbers
    assert type(numbers) is Numbers
    assert not [name for name in vars(numbers) if name.startswith("_")]


@pytest.mark.parametrize(
    ("loader", "match"),
    [
        (3, "takes torch DataLoaders, got int"),
        (nn.Sequential(nn.Linear(1, 1)), "takes torch DataLoaders, got Sequential"),
        (iter([1]), "got the iterator list_iterator, which can be read once"),
        ((x for x in [1]), "got the iterator generator"),
        ([torch.ones(1)], "takes torch DataLoaders, got list: pass DataLoader"),
        (
            TensorDataset(torch.ones(1)),
            "got the dataset TensorDataset, whose items are samples",
        ),
        ({1, 2}, "takes torch DataLoaders, got set"),
    ],
)
def test_what_cannot_be_divided_is_refused(loader: Any, match: str) -> None:
    """What is no iterable of batches, or can be read once, is refused with what to pass instead."""
    with lite_on(1) as lite, pytest.raises(SettingTypeError, match=match):
        lite.setup_dataloaders(loader)


class Graphs:
    """A batch that moves and casts itself, in place, as a batch of graphs."""

    def __init__(self, x: Tensor) -> None:
        self.x = x
        self.device = "cpu"

    def to(self, device: Any) -> None:
        self.device = str(device)

    def apply(self, fn: Callable[[Tensor], Tensor]) -> Graphs:
        self.x = fn(self.x)
        return self


def test_batches_move_and_cast_themselves() -> None:
    """An object with a `to` is moved by it, and cast by its `apply`, as a copy; a module in a batch is left alone."""
    graphs, module = Graphs(torch.ones(1)), nn.Linear(1, 1)
    moved = move_data({"graphs": [graphs], "module": module}, torch.device("meta"))
    assert moved["graphs"][0] is graphs
    assert graphs.device == "meta"
    assert moved["module"].weight.device.type == "cpu"
    cast = map_data(Tensor.double, (graphs, torch.ones(1)))
    assert [cast[0].x.dtype, cast[1].dtype, graphs.x.dtype] == [torch.float64, torch.float64, torch.float32]
    seen = []

    class Net(nn.Linear):
        def forward(self, batch: Graphs) -> Tensor:
            seen.append(batch.x.dtype)
            return super().forward(batch.x)

    with Lite(accelerator="cpu", devices=1, precision="bf16-true") as lite:
        lite.setup(Net(1, 1))(graphs)
    assert seen == [torch.bfloat16]


def test_the_number_of_samples_of_a_batch() -> None:
    """It is the first dimension of the first tensor, wherever that is."""
    assert num_samples({"name": "a", "x": [torch.ones(3, 2)]}) == 3
    assert [num_samples(torch.ones(())), num_samples("text"), num_samples(Graphs(torch.ones(4)))] == [1, 1, 4]


class Stream(IterableDataset[Any]):
    """A stream of lists of numbers, its shards, as Hugging Face's `IterableDataset` is one."""

    def __init__(self, shards: list[list[float]], part: tuple[int, int] = (0, 1), seed: int | None = 1) -> None:
        self.shards = shards
        self.part = part
        self.epoch = 0
        self.ex_iterable = SimpleNamespace(ex_iterable=SimpleNamespace(generator=np.random.default_rng(seed)))

    @property
    def num_shards(self) -> int:
        return len(self.shards)

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, float]]:
        index, count = self.part
        for shard in self.shards[index::count]:
            for number in shard:
                yield {"x": number + 100 * self.epoch}


def fake_datasets() -> None:
    """Put `Stream` in the place of Hugging Face's class."""

    def split_dataset_by_node(dataset: Any, rank: int, world_size: int) -> Any:
        return type(dataset)(dataset.shards, (rank, world_size))

    Stream.__module__ = "datasets.iterable_dataset"
    module: Any = ModuleType("datasets.distributed")
    module.split_dataset_by_node = split_dataset_by_node
    sys.modules.update({"datasets": ModuleType("datasets"), "datasets.distributed": module})


def check_stream(lite: Lite, model: nn.Linear) -> dict[str, Any]:
    """Train on and evaluate a stream of two shards of different lengths."""
    fake_datasets()
    loader = lite.setup_dataloaders(DataLoader(Stream([[0.0, 1.0, 2.0], [3.0]]), batch_size=2))
    grads, read = [], []
    for _ in range(2):
        for batch in loader:
            model.zero_grad()
            lite.backward(model(batch["x"].float()[:, None]).mean())
            grads.append(model.weight.grad.item())
            read.append(batch["x"].tolist())
    with torch.no_grad():
        evaluated = [batch["x"].tolist() for batch in loader]
    lite.all_reduce(torch.ones(1))
    with pytest.raises(SettingError, match=r"pass a seed: stream.shuffle\(seed=1\)\) on rank 1 is not that of rank 0"):
        lite.setup_dataloaders(DataLoader(Stream([[0.0], [1.0]], seed=None)))
    uneven = lite.setup_dataloaders(DataLoader(Stream([[0.0], [1.0], [2.0]]), batch_size=1))
    with torch.no_grad():
        windows = [batch["x"].tolist() for batch in uneven]
    lite.all_reduce(torch.ones(1))
    return {"stream": read, "stream_grads": grads, "evaluated": evaluated, "windows": windows}


def check_on_ranks(world: World) -> dict[str, Any]:
    """Train on and evaluate several kinds of loaders, on two ranks."""
    from torchdata.nodes import Batcher, IterableWrapper, Loader, Mapper

    found: dict[str, Any] = {}
    with lite_on(2) as lite:
        lite.launch()
        model = nn.Linear(1, 1, bias=False)
        nn.init.zeros_(model.weight)
        model = lite.setup(model)
        numbers = lite.setup_dataloaders(Numbers())
        found["len"] = len(numbers)
        grads, read = [], []
        for x in numbers:
            model.zero_grad()
            lite.backward(model(x).mean())
            grads.append(model.weight.grad.item())
            read.append(x.flatten().tolist())
        found["read"], found["grads"] = read, grads
        nodes = Mapper(Batcher(IterableWrapper(range(9)), 2, drop_last=False), torch.tensor)
        nodes = lite.setup_dataloaders(Loader(nodes, restart_on_stop_iteration=True))
        web = lite.setup_dataloaders(WebLoader(DataLoader(TensorDataset(torch.arange(9)), 2)))
        with torch.no_grad():
            for name, loader in (("nodes", nodes), ("web", web)):
                found[name] = [batch.tolist() for batch in loader]
        undivided = lite.setup_dataloaders(Numbers(), use_distributed_sampler=False)
        found["undivided"] = len(list(undivided))
        lite.all_reduce(torch.ones(1))
        found.update(check_stream(lite, model))
    return found


def test_batches_are_divided_between_ranks() -> None:
    """Every batch is read by one rank; gradients are those of one process on the samples of both ranks' batches."""
    pytest.importorskip("torchdata")
    first, second = run_ranks(2, check_on_ranks)
    assert first["read"] == [[0, 1], [4, 5], [8]]
    assert second["read"] == [[2, 3], [6, 7], [8]]  # the last with weight 0, to keep step
    assert first["grads"] == second["grads"] == [1.5, 5.5, 8.0]
    assert [first["len"], second["len"]] == [3, 3]
    for name in ("nodes", "web"):
        assert [first[name], second[name]] == [[[0, 1], [4, 5], [8]], [[2, 3], [6, 7]]]
    assert first["undivided"] == second["undivided"] == 5
    # Each rank reads one shard, and keeps step; the mean is over the samples.
    assert first["stream"] == [[0, 1], [2], [100, 101], [102]]
    assert second["stream"] == [[3], [3], [103], [103]]
    assert first["stream_grads"] == second["stream_grads"] == pytest.approx([4 / 3, 2, 304 / 3, 102])
    assert [first["evaluated"], second["evaluated"]] == [[[200, 201], [202]], [[203]]]
    # Three shards do not divide by two: the samples are divided.
    assert [first["windows"], second["windows"]] == [[[0], [2]], [[1]]]
