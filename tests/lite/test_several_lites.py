"""More than one `Lite`, or more than one launch, in a process: what works, and what raises."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from plugframe import Lite, OrderError, UnsupportedError
from plugframe.hooks.world import World
from plugframe.testing import leftovers
from ranks import run_ranks


def model_of(lite: Lite) -> Any:
    """Return a model with fixed weights and an optimizer, set up by `lite`."""
    torch.manual_seed(3)
    module = torch.nn.Linear(2, 1)
    return lite.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))


def step(lite: Lite, model: Any, optimizer: Any) -> list[float]:
    """Train for a step on data that differ by rank, and return the weights."""
    optimizer.zero_grad()
    lite.backward(model(torch.full((1, 2), 1.0 + lite.global_rank)).sum())
    optimizer.step()
    weight: Tensor = next(iter(model.parameters())).detach()
    return list((weight.full_tensor() if hasattr(weight, "full_tensor") else weight).flatten().tolist())


# ---------------------------------------------------------------------- on two ranks


def one_after_another() -> None:
    """Each restores the process, also for another strategy."""
    found = []
    for strategy in ("ddp", "fsdp", "ddp"):
        with Lite(strategy=strategy) as lite:
            lite.launch()
            found.append(step(lite, *model_of(lite)))
        assert not torch.distributed.is_initialized()
    assert found[0] == found[1] == found[2]


def one_inside_another() -> None:
    """Nested Lites train in turns, each with its own strategy and precision, and the outer one continues afterwards."""
    with Lite(strategy="ddp") as outer:
        outer.launch()
        ours = model_of(outer)
        with Lite(strategy="fsdp") as inner, Lite(strategy="ddp", precision="bf16-true") as third:
            inner.launch()
            third.launch()
            theirs, low = model_of(inner), model_of(third)
            assert step(outer, *ours) == step(inner, *theirs)
            assert next(low[0].parameters()).dtype is torch.bfloat16
            step(third, *low)
            assert step(outer, *ours) == step(inner, *theirs)
        step(outer, *ours)
        assert outer.all_reduce(torch.ones(1), reduce_op="sum").item() == 2


def the_one_that_met_first_leaves_first() -> None:
    """Tear-down of the first Lite ends the group of the second: its calls raise, and it can be torn down."""
    first, second = Lite(strategy="ddp"), Lite(strategy="ddp")
    first.launch()
    second.launch()
    first.teardown()
    with pytest.raises(OrderError, match="The process group of this job is gone: another Lite.*made it last"):
        second.barrier()
    second.teardown()
    with Lite(strategy="ddp") as third:
        third.launch()
        step(third, *model_of(third))


def a_module_of_another() -> None:
    """A module is set up by one Lite at a time."""
    with Lite(strategy="ddp") as first, Lite(strategy="fsdp") as second:
        first.launch()
        second.launch()
        model, optimizer = model_of(first)
        with pytest.raises(OrderError, match="This Linear was set up already: set a module up once"):
            second.setup(model, optimizer)


def on_a_rank(world: World) -> None:
    for case in (one_after_another, one_inside_another, the_one_that_met_first_leaves_first, a_module_of_another):
        case()


def test_several_on_two_ranks() -> None:
    """Lites in turn, nested, torn down in the wrong order, and with a shared module."""
    run_ranks(2, on_a_rank)


# ---------------------------------------------------------------------- launching


def ranks_of(lite: Lite, factor: int) -> int:
    """Runs on every rank."""
    return factor * int(lite.all_reduce(torch.ones(1), reduce_op="sum").item())


@pytest.mark.ranks
def test_a_process_launches_again_and_again() -> None:
    """Launch again works with the same `Lite`, another one, and inside one that runs here on one device."""
    lite = Lite(accelerator="cpu", devices=2, strategy="ddp_fork")
    assert [lite.launch(ranks_of, 3), lite.launch(ranks_of, 4)] == [6, 8]
    with Lite(accelerator="cpu", devices=1) as here:
        here.launch()
        mine = model_of(here)
        assert Lite(accelerator="cpu", devices=2, strategy="ddp_fork").launch(ranks_of, 5) == 10
        step(here, *mine)


def test_a_process_with_a_group_is_not_forked() -> None:
    """Forks would inherit a group of one rank: the launch is refused before any starts, and this job continues."""
    with Lite(accelerator="cpu", devices=1, strategy="ddp") as here:
        here.launch()
        mine = model_of(here)
        with pytest.raises(UnsupportedError, match="from a process that has a process group: tear down the Lite"):
            Lite(accelerator="cpu", devices=2, strategy="ddp_fork").launch(ranks_of, 5)
        step(here, *mine)


def fail_inside(strategy: str) -> None:
    with Lite(accelerator="cpu", devices=1, strategy=strategy) as lite:
        lite.launch()
        step(lite, *model_of(lite))
        raise ZeroDivisionError


@pytest.mark.parametrize("strategy", ["single", "ddp"])
def test_a_test_that_fails_inside_a_lite_leaves_nothing(strategy: str) -> None:
    """Variables, hooks, threads and groups are restored for the next test."""
    before = leftovers.traces(), leftovers.of_tests()
    with pytest.raises(ZeroDivisionError):
        fail_inside(strategy)
    after = leftovers.traces(), leftovers.of_tests()
    assert [leftovers.left(was, now) for was, now in zip(before, after, strict=True)] == ["", ""]
