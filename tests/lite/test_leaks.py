"""Repeated set-up in one process leaks no object, thread or file descriptor."""

from __future__ import annotations

import gc
import os
import threading
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite
from plugframe.hooks.world import World
from plugframe.testing import run_ranks

DATA = TensorDataset(torch.zeros(4, 2))
#: How often something is done before objects are counted and between two counts, and how many a thing done may leave.
WARM_UP, TIMES, ALLOWED = 20, 20, 0.95


def train(lite: Lite) -> None:
    """Set up a model, an optimizer and a loader, make a step, and forget them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for (batch,) in lite.setup_dataloaders(DataLoader(DATA, batch_size=2)):
        optimizer.zero_grad()
        lite.backward(model(batch).sum())
        optimizer.step()


def left_by(do: Callable[[], None]) -> dict[str, float]:
    """Return the kinds of objects whose number grows with each call of `do`, and by how many.

    A cache that fills once is no leak: what is left in two windows in a row is.
    """
    for _ in range(WARM_UP):
        do()
    gc.freeze()  # what is there already is neither collected nor counted: half a million objects in a long session
    first = left_in_window(do)
    second = left_in_window(do)  # even if the first one differs: all ranks set up equally
    return {kind: number for kind, number in second.items() if kind in first}


def left_in_window(do: Callable[[], None]) -> dict[str, float]:
    before = counted()
    for _ in range(TIMES):
        do()
    more = counted()
    more.subtract(before)
    return {kind: number / TIMES for kind, number in more.items() if number / TIMES > ALLOWED}


def counted() -> Counter[str]:
    for _ in range(2):
        gc.collect()
    found = Counter(f"object {type(each).__module__}.{type(each).__qualname__}" for each in gc.get_objects())
    found["thread"] = threading.active_count()
    if os.path.isdir("/proc/self/fd"):
        found["descriptor"] = len(os.listdir("/proc/self/fd"))
    return found


def of_ranks(world: World) -> dict[str, Any]:
    """Return the leaks of each strategy on this rank."""
    found = {}
    for strategy in ("ddp", "fsdp"):
        with Lite(accelerator="cpu", strategy=strategy) as lite:
            found[strategy] = left_by(lambda: train(lite))
    return found


def test_set_ups_leave_nothing() -> None:
    """Hundreds of models and loaders in one Lite do not leak: a model per fold, a loader per evaluation."""
    with Lite(accelerator="cpu", devices=1) as lite:
        assert left_by(lambda: train(lite)) == {}


def test_what_is_alive_at_tear_down_is_given_back() -> None:
    """Tear-down restores all objects that are alive, though others are gone."""
    lite = Lite(accelerator="cpu", devices=1)
    models = [lite.setup(nn.Linear(2, 2)) for _ in range(3)]
    del models[1]
    lite.teardown()
    assert [type(model) for model in models] == [nn.Linear, nn.Linear]


def test_lites_leave_nothing() -> None:
    """Creating, using and tearing down a Lite repeatedly does not leak."""

    def job() -> None:
        with Lite(accelerator="cpu", devices=1) as lite:
            train(lite)

    assert left_by(job) == {}


@pytest.mark.parametrize("num_ranks", [2])
def test_set_ups_of_ranks_leave_nothing(num_ranks: int) -> None:
    """Repeated set-up does not leak on any rank, under ddp and fsdp."""
    assert run_ranks(num_ranks, of_ranks) == [{"ddp": {}, "fsdp": {}}] * num_ranks
