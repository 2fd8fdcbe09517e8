"""Fabric's examples run after a change of the import."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fabric_examples import EXAMPLES, make
from lightning_module import Lightning
from plugframe import UnsupportedError, World
from plugframe.fabric import Fabric
from ranks import run_ranks


def run_all(world: World, folder: Path) -> dict[str, float | str]:
    """Run every example, one after the other, and return their losses."""
    found: dict[str, float | str] = {}
    for example in EXAMPLES:
        with make(example, world.world_size) as fabric:
            fabric.launch()
            found[example.__name__] = example(fabric, folder)
    return found


def run_all_and_more(world: World, folder: Path) -> dict[str, float | str]:
    """Run every example, and what needs ranks besides, in one start of them."""
    found = run_all(world, folder)
    check_process_group(world)
    check_lightning_module(world)
    return found


def check_process_group(world: World) -> None:
    """A group of all ranks is used to exchange gradients; one of some ranks is refused."""
    with Fabric(accelerator="cpu", devices=2) as fabric:
        fabric.launch()
        everyone, first = dist.new_group([0, 1]), dist.new_group([0])
        fabric.strategy._given_group = first
        with pytest.raises(UnsupportedError, match="ranks, and replicas of the others would differ"):
            fabric.strategy.strategy_setup(context=fabric.strategy.context)
        fabric.strategy._given_group = everyone
        fabric.strategy.strategy_setup(context=fabric.strategy.context)
        model = fabric.setup(nn.Linear(1, 1))
        fabric.backward(model(torch.full((1, 1), fabric.global_rank + 1.0)).sum())
        assert model.weight.grad.item() == 1.5


def check_lightning_module(world: World) -> None:
    """Steps of a LightningModule run under the strategy: gradients are those of all ranks."""
    with Fabric(accelerator="cpu", devices=2) as fabric:
        fabric.launch()
        model = Lightning()
        model, _ = fabric.setup(model, torch.optim.SGD(model.parameters(), lr=1.0))
        loss = model.training_step(torch.full((1, 1), fabric.global_rank + 1.0), 0)
        fabric.backward(loss)
        assert model.layer.weight.grad.item() == 1.5


def test_the_examples_run_on_one_rank(tmp_path: Path) -> None:
    """8 of 8 run on one device, without a warning."""
    (losses,) = run_ranks(1, run_all, tmp_path)
    assert len(losses) == 8
    assert all(isinstance(loss, float) and math.isfinite(loss) for loss in losses.values()), losses


def test_the_examples_run_on_two_ranks(tmp_path: Path) -> None:
    """8 of 8 run on two ranks, and end with one loss on both."""
    first, second = run_ranks(2, run_all_and_more, tmp_path)
    assert first == pytest.approx(second)
    assert len(first) == 8
    assert all(math.isfinite(loss) for loss in first.values()), first
