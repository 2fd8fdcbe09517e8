"""Steps are skipped on all ranks, under ddp, fsdp and a loss scaler; the count is in the checkpoint."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from plugframe import Lite
from plugframe.hooks.world import World
from plugframe.testing import run_ranks
from plugframe_builtins.nan_guard.extension import NaNGuard

SKIPPED = "not finite.*: step skipped"


def job(guard: NaNGuard, **settings: Any) -> Lite:
    return Lite(**{"accelerator": "cpu", "plugins": [guard], "devices": 1, **settings})


def train(lite: Lite, bad: dict[int, float], num_steps: int = 4, rank: int = 0) -> tuple[list[Any], list[bool]]:
    """Train with a factor in some losses of one rank; return the weights after each step, and lite.should_stop."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 6), nn.Linear(6, 2))
    net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9))
    weights, stops = [], []
    for step in range(num_steps):
        optimizer.zero_grad()
        loss = net(torch.ones(3, 4)).square().mean()
        if step in bad and lite.global_rank == rank:
            loss = loss * bad[step]
        lite.backward(loss)
        optimizer.step()
        weights.append(lite.state_dict(net, all_ranks=True))
        stops.append(lite.should_stop)
    return weights, stops


def changes(weights: list[Any]) -> list[bool]:
    """Return whether each step but the first changed the weights."""
    return [any(not torch.equal(a[n], b[n]) for n in a) for a, b in itertools.pairwise(weights)]


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_skipped(factor: float, precision: str) -> None:
    """The weights stay as they are, and the next step is made."""
    guard = NaNGuard()
    with job(guard, precision=precision) as lite, pytest.warns(UserWarning, match=SKIPPED):
        weights, stops = train(lite, {1: factor})
    assert changes(weights) == [False, True, True]
    assert (guard.num_skipped, guard.num_in_a_row, stops) == (1, 0, [False] * 4)


class Overflows(torch.autograd.Function):
    """The identity, with a gradient that is not finite."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return gradient * math.inf


def test_a_gradient_that_is_not_finite_is_skipped() -> None:
    """A finite loss may have one; a loss scaler handles it by itself."""
    for precision, num_skipped in (("32-true", 1), ("16-mixed", 0)):
        guard = NaNGuard()
        with job(guard, precision=precision) as lite:
            net = nn.Linear(2, 2)
            net, optimizer = lite.setup(net, torch.optim.SGD(net.parameters(), lr=0.1))
            lite.backward(Overflows.apply(net(torch.ones(1, 2))).sum())  # type: ignore[no-untyped-call]
            if num_skipped:
                with pytest.warns(UserWarning, match=SKIPPED):
                    optimizer.step()
            else:
                optimizer.step()
            assert guard.num_skipped == num_skipped
            assert all(bool(parameter.isfinite().all()) for parameter in net.parameters())


def test_many_in_a_row_stop_the_run_also_across_a_resume(tmp_path: Path) -> None:
    """The count goes on where the checkpoint left it."""
    guard = NaNGuard(max_in_a_row=3)
    with job(guard) as lite:
        with pytest.warns(UserWarning, match=SKIPPED):
            _, stops = train(lite, {2: math.nan, 3: math.nan})
        lite.save(tmp_path / "x", {})
    assert stops == [False] * 4
    guard = NaNGuard(max_in_a_row=3)
    with job(guard) as lite:
        lite.load(tmp_path / "x", {})
        with pytest.warns(UserWarning, match="3 in a row"):
            _, stops = train(lite, {0: math.nan})
    assert stops == [True] * 4
    assert guard.num_skipped == 3


def on_ranks(world: World, strategy: str, precision: str) -> tuple[Any, ...]:
    guard = NaNGuard(max_in_a_row=2)
    with job(guard, devices=world.world_size, strategy=strategy, precision=precision) as lite:
        if world.global_rank == 0:
            with pytest.warns(UserWarning, match=SKIPPED):
                weights, stops = train(lite, {1: math.nan, 2: math.inf}, rank=1)
        else:
            weights, stops = train(lite, {1: math.nan, 2: math.inf}, rank=1)
    return changes(weights), stops, guard.num_skipped, float(weights[-1]["0.weight"].sum())


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_skip_and_stop_together(strategy: str, precision: str) -> None:
    """A loss that is not finite on one rank skips the step on both, which stop at the same read."""
    first, second = run_ranks(2, on_ranks, strategy, precision)
    assert first == second
    assert first[:3] == ([False, False, True], [False, False, True, True], 2)
