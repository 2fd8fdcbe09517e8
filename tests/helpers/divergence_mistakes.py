"""Loops with one mistake each, after which the ranks no longer do the same. The lines to be named are marked."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn

from plugframe import Lite
from plugframe.hooks.world import World
from ranks import rank_store

#: Each with what the message must say besides ranks and lines.
MISTAKES: dict[Callable[[Any], None], tuple[str, ...]] = {}


def mistake(*says: str) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    def add(function: Callable[[Any], None]) -> Callable[[Any], None]:
        MISTAKES[function] = says
        return function

    return add


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(2, 2), nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, *, whole: bool = True) -> torch.Tensor:
        if x.isnan().any():
            raise ValueError("not a number")
        return self.head(self.body(x)) if whole else self.body(x)


def prepared(lite: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    model = Net()
    return lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))


@mistake("(2,) float32", "(3,) float32", "same shape")
def shapes_differ(lite: Any) -> None:
    lite.all_reduce(torch.ones(2 + lite.global_rank))  # rank 0, rank 1


@mistake("float32", "float64", "same shape, dtype")
def dtypes_differ(lite: Any) -> None:
    lite.all_gather(torch.ones(2, dtype=torch.float64 if lite.global_rank else torch.float32))  # rank 0, rank 1


@mistake("all_reduce", "all_gather", "same calls in the same order")
def operations_differ(lite: Any) -> None:
    ones = torch.ones(2)
    [lite.all_reduce, lite.all_gather][lite.global_rank](ones)  # rank 0, rank 1


@mistake("float32 sum", "float32 max")
def reductions_differ(lite: Any) -> None:
    lite.all_reduce(torch.ones(2), reduce_op="max" if lite.global_rank else "sum")  # rank 0, rank 1


@mistake("src=0", "src=1")
def sources_differ(lite: Any) -> None:
    lite.broadcast([1], src=lite.global_rank)  # rank 0, rank 1


@mistake("all_reduce stands under 'if lite.is_global_zero:'", "move it out")
def a_collective_of_rank_zero(lite: Any) -> None:
    loss = torch.ones(())
    if lite.is_global_zero:
        lite.all_reduce(loss)  # rank 0
    lite.barrier()  # rank 1


@mistake("save stands under 'if lite.is_global_zero:'", "move it out")
def a_save_of_rank_zero(lite: Any) -> None:
    model, optimizer = prepared(lite)
    for _ in range(2):
        optimizer.zero_grad()
        lite.backward(model(torch.ones(1, 2)).sum())  # rank 1
        optimizer.step()
        if lite.is_global_zero:
            lite.save("never", {"model": model})  # rank 0


@mistake("has left 'for _ in range(3 - lite.global_rank):'", "different numbers of batches")
def batches_differ(lite: Any) -> None:
    model, optimizer = prepared(lite)
    for _ in range(3 - lite.global_rank):
        optimizer.zero_grad()
        lite.backward(model(torch.ones(1, 2)).sum())  # rank 0
        optimizer.step()
    lite.all_reduce(torch.ones(()))  # rank 1


@mistake("Has 'except ValueError:'", "passed over an exception on rank 1")
def an_exception_passed_over(lite: Any) -> None:
    model, optimizer = prepared(lite)
    for number in range(3):
        x = torch.full((1, 2), float("nan") if number == 1 and lite.global_rank == 1 else 1.0)
        optimizer.zero_grad()
        try:
            lite.backward(model(x).sum())  # rank 0, rank 1
        except ValueError:
            continue
        optimizer.step()


@mistake("same calls in the same order")
def the_order_differs(lite: Any) -> None:
    one, two = torch.ones(2), torch.ones(2)
    for turn in (0, 1) if lite.global_rank == 0 else (1, 0):
        if turn == 0:
            lite.all_reduce(one)  # rank 0
        else:
            lite.all_reduce(two)  # rank 1


@mistake("rank 1 has shut down", "the same number of batches")
def a_rank_stops_early(lite: Any) -> None:
    for number in range(3):
        if number == 2 and lite.global_rank == 1:
            return
        lite.all_reduce(torch.ones(2))  # rank 0


def marked(function: Callable[[Any], None], rank: int) -> list[str]:
    """Return the sites that are marked for a rank."""
    path, code = Path(__file__), function.__code__
    lines = path.read_text(encoding="utf-8").splitlines()
    own = range(code.co_firstlineno, max(line for *_, line in code.co_lines() if line) + 1)
    return [f"{path.name}:{number}" for number in own if f"rank {rank}" in lines[number - 1].partition("  # ")[2]]


def run_all(world: World, plugins: tuple[str, ...], timeout_s: float = 20.0) -> dict[str, tuple[str, str, float]]:
    """Make every mistake in a job of its own; return what came of each: the error's class, its text, seconds."""
    found = {}
    store = rank_store(60.0)
    for function in MISTAKES:
        kind, text, start = "", "", 0.0
        with (
            suppress(_ToldError),
            Lite(accelerator="cpu", devices=2, strategy="ddp", plugins=plugins, timeout_s=timeout_s) as lite,
        ):
            lite.launch()
            start = time.monotonic()
            try:
                function(lite)
            except Exception as error:
                kind, text = type(error).__name__, str(error)
                raise _ToldError(text) from error
        found[function.__name__] = (kind, text, time.monotonic() - start)
        store.set(f"{function.__name__}/{world.global_rank}", "done")
        store.wait([f"{function.__name__}/{rank}" for rank in range(world.world_size)])
    return found


class _ToldError(Exception):
    pass
