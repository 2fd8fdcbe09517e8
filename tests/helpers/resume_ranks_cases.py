"""Runs that are saved on one number of ranks and go on with another, for the tests of `test_resume_ranks`."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, WeightedRandomSampler

from plugframe import CheckpointMismatchError, Lite, PlugframeWarning
from plugframe.hooks.world import World

NUMBER = 47


class Numbers(IterableDataset[int]):
    """A stream that shuffles in a buffer and cannot tell where it is."""

    def __iter__(self) -> Iterator[int]:
        buffer: list[int] = []
        for index in range(NUMBER + 5):
            if index < NUMBER:
                buffer.append(index)
            if index >= 5:
                yield buffer.pop(random.randrange(len(buffer)))


class Placed(IterableDataset[int]):
    """A stream that can tell where it is."""

    position = 0

    def __iter__(self) -> Iterator[int]:
        while self.position < NUMBER:
            self.position += 1
            yield self.position - 1
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Own(DataLoader[Any]):
    """A loader class that reads in a way of its own."""

    def __iter__(self) -> Iterator[Any]:
        yield from super().__iter__()


def loader_of(kind: str, size: int) -> DataLoader[Any]:
    data: Any = range(NUMBER)
    shuffled: dict[str, Any] = {"batch_size": size, "shuffle": True}
    if kind == "batch sampler":
        return DataLoader(data, batch_sampler=BatchSampler(RandomSampler(data), size, False))  # type: ignore[arg-type]
    if kind == "own batches":
        return DataLoader(data, batch_sampler=[list(range(at, min(at + 3, NUMBER))) for at in range(0, NUMBER, 3)])
    if kind == "weighted":
        return DataLoader(data, batch_size=size, sampler=WeightedRandomSampler(torch.arange(1.0, NUMBER + 1), NUMBER))
    if kind == "own loader":
        return Own(data, **shuffled)
    if kind.startswith("stream"):
        stream = Placed() if "placed" in kind else Numbers()
        return DataLoader(stream, batch_size=size, num_workers=2 * ("workers" in kind))
    return DataLoader(data, **shuffled, drop_last="drop" in kind, num_workers=2 * ("workers" in kind))


#: What to call, under which name, with which keyword arguments.
Plan = list[tuple[str, dict[str, Any]]]


def go_through(world: World, folder: str, plan: Plan) -> dict[str, Any]:
    """Read as each entry of `plan` says; return what this rank read, by its name."""
    return {name: read(world, folder, **how) for name, how in plan}


def read(
    world: World, folder: str, *, kind: str, size: int, stop: int | None, load: str | None, save: str | None
) -> Any:
    """Read two epochs, or from where `load` was saved on; stop after `stop` batches of the first and `save`.

    Returns:
        The batches of each epoch, or the error if the place that was saved is refused.
    """
    warnings.simplefilter("ignore", PlugframeWarning)
    with Lite(accelerator="cpu", devices=world.world_size) as lite:
        lite.seed_everything(3)
        lite.setup(nn.Linear(1, 1))
        loader = lite.setup_dataloaders(loader_of(kind, size))
        if load:
            try:
                lite.load(os.path.join(folder, load), {})
            except CheckpointMismatchError as error:
                return str(error)
        epochs: list[list[list[int]]] = []
        for _ in range(2):
            epochs.append([])
            for batch in loader:
                epochs[-1].append(batch.tolist() if lite.batch_weight else [])
                if len(epochs[-1]) == stop:
                    lite.save(os.path.join(folder, str(save)), {})
                    return epochs
    return epochs


def numbers_drawn(world: World, folder: str, file: str, load: bool) -> Any:
    """Train with dropout, noise and numbers of each rank's own; save in the middle; return what every step drew."""
    warnings.simplefilter("ignore", PlugframeWarning)
    drawn: list[Tensor] = []
    with Lite(accelerator="cpu", devices=world.world_size) as lite:
        lite.seed_everything(3, per_rank=True)
        model = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        loader = lite.setup_dataloaders(DataLoader(torch.ones(24, 2), batch_size=2))
        state: dict[str, Any] = {"model": model, "optimizer": optimizer}
        if load:
            lite.load(os.path.join(folder, file), state)
        for step, batch in enumerate(loader):
            out = model(batch + torch.rand(2, 2) + random.random())
            lite.backward(out.square().mean())
            optimizer.step()
            optimizer.zero_grad()
            drawn.append(out.detach())
            if step == 2 and not load:
                lite.save(os.path.join(folder, file), state)
    return [each.flatten().tolist() for each in drawn]
