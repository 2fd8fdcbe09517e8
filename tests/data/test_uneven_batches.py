"""Losses are weighed by their batches, in whatever order batches are read and used."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite, OrderError
from plugframe.hooks.world import World
from ranks import run_checks

STRATEGIES = ("ddp", "fsdp")
#: Numbers of samples whose last window is uneven on two ranks that read two each; with 9, rank 1 gets none of it.
NUMBERS = (11, 9)


@contextmanager
def ranks(world: World) -> Iterator[World]:
    yield world


@dataclass
class Pair:
    """A batch of a user's class."""

    x: Tensor
    y: Tensor


class Takes(nn.Module):
    """A model that accepts tensors, mappings or dataclasses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.inner = nn.Linear(4, 1)

    def forward(self, batch: Any) -> Tensor:
        x = batch.x if isinstance(batch, Pair) else batch["x"] if isinstance(batch, dict) else batch
        return self.inner(x.float())  # type: ignore[no-any-return]


Body = Callable[[Any, Any, Any, Any], None]


def rows(number: int, seed: int = 1) -> Tensor:
    return torch.randn(number, 4, generator=torch.Generator().manual_seed(seed))


def trained(body: Body, data: Tensor, *, lite: Any, strategy: str, size: int, **options: Any) -> Tensor:
    """Return the weights after `body(lite, model, optimizer, loader)`, on all ranks or, without `lite`, on one."""
    del strategy
    model = Takes()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loader = DataLoader(TensorDataset(data), batch_size=size, **options)
    if lite is not None:
        model, optimizer = lite.setup(model, optimizer)
        loader = lite.setup_dataloaders(loader)
    body(lite or Alone(), model, optimizer, loader)
    weight = model.inner.weight.detach()
    return weight.full_tensor() if isinstance(weight, DTensor) else weight


class Alone:
    """The plain counterpart of `Lite` in one process."""

    def backward(self, loss: Tensor, *, batch: Any = None, reduction: str = "mean") -> None:
        loss.backward()


def same_as_one(body: Body, world: World, numbers: tuple[int, ...] = NUMBERS, **options: Any) -> None:
    """Compare with one process whose batch is the global batch."""
    for strategy, number in itertools.product(STRATEGIES, numbers):
        with Lite(accelerator="cpu", strategy=strategy, devices=world.world_size) as lite:
            lite.launch()
            ours = trained(body, rows(number), lite=lite, strategy=strategy, size=2, **options)
        theirs = trained(body, rows(number), lite=None, strategy=strategy, size=2 * world.world_size)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6, msg=f"{strategy} {number} {body.__name__}")


def step(lite: Any, model: Any, optimizer: Any, x: Any, **kwargs: Any) -> None:
    optimizer.zero_grad()
    lite.backward(model(x).pow(2).mean(), **kwargs)
    optimizer.step()


def ahead(loader: Any) -> Iterator[Any]:
    iterator = iter(loader)
    batch = next(iterator)
    for following in iterator:
        yield batch
        batch = following
    yield batch


def plain(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in loader:
        step(lite, model, optimizer, x)


def plain_made_anew(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in loader:
        step(lite, model, optimizer, x.double() * 2)


def read_ahead(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in ahead(loader):
        step(lite, model, optimizer, x)


def views(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in ahead(loader):
        x = batch[0][:, :].detach()
        del batch
        step(lite, model, optimizer, x)


def nested(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for at, (x,) in enumerate(ahead(loader)):
        step(lite, model, optimizer, {"x": x, "n": 3} if at % 2 else Pair(x, x[:1]))


def told(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for batch in ahead(loader):
        step(lite, model, optimizer, batch[0] * 2, batch=batch)


def listed_twice(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    batches = list(loader)
    for (x,) in (*batches, *batches):
        step(lite, model, optimizer, x)


def cycled(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in itertools.islice(itertools.cycle(loader), 7):
        step(lite, model, optimizer, x)


def teed(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    first, second = itertools.tee(loader)
    next(second)
    for (x,), _ in itertools.zip_longest(first, second):
        step(lite, model, optimizer, x)


def summed(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """One backward for all losses of an epoch."""
    optimizer.zero_grad()
    losses = [model(x).pow(2).mean() for (x,) in loader]
    lite.backward(torch.stack(losses).sum())
    optimizer.step()


def summed_ahead(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    optimizer.zero_grad()
    lite.backward(sum(model(x).pow(2).mean() for (x,) in list(loader)))
    optimizer.step()


def collected(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    iterator = iter(loader)
    while chunk := list(itertools.islice(iterator, 2)):
        optimizer.zero_grad()
        for (x,) in chunk:
            lite.backward(model(x).pow(2).mean() / len(chunk))
        optimizer.step()


def evaluated(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """An evaluation of the same loader within a training pass."""
    for (x,) in ahead(loader):
        optimizer.zero_grad()
        loss = model(x).pow(2).mean()
        with torch.no_grad():
            for (y,) in loader:
                model(y)
        lite.backward(loss)
        optimizer.step()


def twice(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """Two backwards of one batch, and a batch kept from the beginning."""
    kept = None
    for (x,) in loader:
        kept = x if kept is None else kept
        optimizer.zero_grad()
        loss = model(x)
        lite.backward(loss.pow(2).mean())
        lite.backward(model(x).mean())
        optimizer.step()


def sums(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    for (x,) in loader:
        optimizer.zero_grad()
        lite.backward(model(x).pow(2).sum() / 10, reduction="sum")
        optimizer.step()


def summed_sums(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    optimizer.zero_grad()
    lite.backward(sum(model(x).pow(2).sum() / 10 for (x,) in list(loader)), reduction="sum")
    optimizer.step()


def chained(lite: Any, model: Any, optimizer: Any, loader: Any) -> None:
    """A model that is called with its own output."""
    for (x,) in ahead(loader):
        optimizer.zero_grad()
        made = model(x) * torch.ones(1, 4)
        lite.backward(model(made).pow(2).mean() + made.mean())
        optimizer.step()


BODIES = (
    *(plain, plain_made_anew, read_ahead, views, nested, told, listed_twice, cycled, teed, summed, summed_ahead),
    *(collected, evaluated, twice, sums, summed_sums),
)


def every_loop_trains_as_one_process_does(world: World) -> None:
    for body in BODIES:
        same_as_one(body, world)


def a_model_that_feeds_another_is_weighed_once(world: World) -> None:
    with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size) as lite:
        lite.launch()
        outcomes = []
        for side in (lite, None):
            torch.manual_seed(0)
            models = [nn.Linear(4, 4), nn.Linear(4, 1)]
            size = 2 if side else 2 * world.world_size
            loader = DataLoader(rows(11), batch_size=size)
            if side:
                models = [lite.setup(m) for m in models]
                loader = lite.setup_dataloaders(loader)
            for x in ahead(loader):
                made = models[0](x)
                (side or Alone()).backward(models[1](made.relu()).mean() + made.pow(2).mean())
            outcomes.append([p.grad for m in models for p in m.parameters()])
        for ours, theirs in zip(*outcomes, strict=True):
            torch.testing.assert_close(ours, theirs)


def loaders_read_side_by_side_weigh_each_by_itself(world: World) -> None:
    def body(first: Any, second: Any, side: Any, model: Any) -> None:
        for x, y in zip(first, second, strict=True):
            side.backward(model(x).pow(2).mean() + model(y).mean())

    with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size) as lite:
        lite.launch()
        grads = []
        for side in (lite, None):
            model = Takes()
            size = 2 if side else 2 * world.world_size
            pair = [DataLoader(rows(n, n), batch_size=size) for n in (11, 10)]
            if side:
                model, pair = lite.setup(model), lite.setup_dataloaders(*pair)
            body(*pair, side or Alone(), model)
            grads.append(model.inner.weight.grad)
        torch.testing.assert_close(*grads)
        first, second = lite.setup_dataloaders(*[DataLoader(rows(n, n), batch_size=2) for n in (11, 10)])
        model = lite.setup(Takes())

        def mixed() -> None:
            for x, y in zip(first, second, strict=True):
                lite.backward(model(torch.cat([x, y])).mean())

        with pytest.raises(OrderError, match="belongs to batches of several loaders, which are uneven"):
            mixed()


def a_batch_that_cannot_be_known_is_refused(world: World) -> None:
    with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size) as lite:
        lite.launch()
        model = lite.setup(Takes())
        # Even batches are never asked about, nor is a script that has nothing to do with the loader.
        even = lite.setup_dataloaders(DataLoader(rows(8), batch_size=2))
        for x in ahead(even):
            lite.backward(model(x * 2).mean())
        lite.backward(model(torch.ones(2, 4)).mean())
        loader = lite.setup_dataloaders(DataLoader(rows(11), batch_size=2))

        def train(batches: Any) -> None:
            for x in batches:
                lite.backward(model(x * 2).mean())

        for source in (ahead, lambda loader: [x * 2 for x in loader]):
            with pytest.raises(OrderError, match=r"one of several batches that were read ahead.*batch=batch"):
                train(source(loader))


def batch_weight_is_that_of_the_batch_at_hand(world: World) -> None:
    with Lite(accelerator="cpu", strategy="ddp", devices=world.world_size) as lite:
        lite.launch()
        model = lite.setup(Takes())
        loader = lite.setup_dataloaders(DataLoader(rows(11), batch_size=2))
        for source in (lambda: loader, lambda: list(loader), lambda: ahead(loader)):
            total, weights = torch.zeros(()), []
            for x in source():
                with torch.no_grad():
                    total += model(x).mean() * lite.batch_weight
                weights.append(lite.batch_weight)
            assert weights == [1.0, 1.0, 4 / 3 if world.global_rank == 0 else 2 / 3]


CHECKS = (
    every_loop_trains_as_one_process_does,
    a_model_that_feeds_another_is_weighed_once,
    loaders_read_side_by_side_weigh_each_by_itself,
    a_batch_that_cannot_be_known_is_refused,
    batch_weight_is_that_of_the_batch_at_hand,
)


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    return run_checks(2, ranks, CHECKS)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_uneven_batches(check: Any, failures: dict[str, str]) -> None:
    """Gradients equal those of one process, in whatever order batches are read; else backward raises."""
    assert not failures[check.__name__], failures[check.__name__]
