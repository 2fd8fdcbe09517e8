"""Carrying optimizers over from the parameters they were made with to those that took their place."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils.weak import WeakIdKeyDictionary


class Successors:
    """Knows which parameter took the place of which."""

    def __init__(self) -> None:
        # While an old parameter lives, in an optimizer, so does what took its place.
        self._successor: Any = WeakIdKeyDictionary()

    def __reduce__(self) -> tuple[Any, ...]:
        return Successors, ()  # a strategy that is sent to another process finds other parameters there

    def note(self, before: Mapping[str, nn.Parameter], after: Mapping[str, nn.Parameter]) -> None:
        """Take note that parameters were replaced, by name."""
        for name, old in before.items():
            if after[name] is not old:
                self._successor[old] = after[name]

    def carry_over(self, optimizers: Iterable[Optimizer]) -> None:
        """Put the new parameters into the optimizers' groups, in the old ones' places, with their state."""
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [self._carried(optimizer, parameter) for parameter in group["params"]]

    def _carried(self, optimizer: Optimizer, old: Tensor) -> Tensor:
        new = self._successor.get(old)
        if new is None:
            return old
        if old in optimizer.state:
            kept = optimizer.state.pop(old)
            optimizer.state[new] = {name: _alike(value, old, new) for name, value in kept.items()}
        return new  # type: ignore[no-any-return]


def _alike(value: Any, old: Tensor, new: Tensor) -> Any:
    """Return an entry of the optimizer's state spread over the ranks as its parameter is."""
    if not isinstance(value, Tensor) or not isinstance(new, DTensor) or value.shape != old.shape or not value.dim():
        return value
    with torch.no_grad():
        return distribute_tensor(value.to(new.device), new.device_mesh, new.placements, src_data_rank=None)
