"""Modules that stack the weights of all experts: what they are called with, and what the ranks exchange for it.

A dispatch is a function ``f(forward, exchange, *args, **kwargs)``, called in place of the module's forward:
``exchange(rows, run)`` takes a list with the rows of this rank for each of all experts, and returns their outputs
likewise; ``run(rows)`` computes them on the rank that has the experts, from the rows of all ranks for each of its own
ones, with ``forward``, whose weights are those of its own experts only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import UnsupportedError

Forward = Callable[..., Any]
Exchanging = Callable[[Sequence[Tensor], Callable[[list[Tensor]], Sequence[Tensor]]], list[Tensor]]
Dispatch = Callable[..., Any]


def grouped(forward: Forward, exchange: Exchanging, x: Tensor, counts: Tensor) -> Tensor:
    """For a forward of tokens sorted by expert, of shape (tokens, *S), and the number of tokens of each expert."""

    def run(rows: list[Tensor]) -> Sequence[Tensor]:
        sizes = [len(each) for each in rows]
        found: Tensor = forward(torch.cat(rows), counts.new_tensor(sizes))
        return torch.split(found, sizes)

    numbers = counts.tolist()
    if sum(numbers) != len(x):
        raise UnsupportedError(
            f"Grouped experts got {len(x)} tokens and numbers of tokens that add up to {sum(numbers)}: strategy "
            "'expert' needs the tokens of all experts one after another, without padding."
        )
    return torch.cat(exchange(torch.split(x, numbers), run))


def batched(forward: Forward, exchange: Exchanging, x: Tensor) -> Tensor:
    """For a forward of shape (experts, capacity, *S); ranks may have different capacities."""
    return torch.stack(exchange(x.unbind(), lambda rows: forward(torch.stack(rows)).unbind()))


#: By the name in a plan.
DISPATCHES: dict[str, Dispatch] = {"grouped": grouped, "batched": batched}
