"""Real ranks for the tests, see `plugframe.testing.ranks`; and the hooks of plugins without a job around them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from plugframe.hooks import KINDS
from plugframe.testing.ranks import RanksFailed, rank_store, run_checks, run_ranks

__all__ = ["RanksFailed", "Tracking", "buffers_on_ranks", "hooks_of", "rank_store", "run_checks", "run_ranks"]


def hooks_of(*plugins: Any, **others: Callable[..., Any]) -> SimpleNamespace:
    """Return the hooks of `plugins` as a `Context` has them: by name, arguments by keyword only."""
    hooks = {}
    for plugin in plugins:
        for name in dir(plugin):
            if name.partition("_")[0] in KINDS:
                hooks[name] = _by_keyword(getattr(plugin, name))
    return SimpleNamespace(**{**hooks, **others})


def _by_keyword(method: Callable[..., Any]) -> Callable[..., Any]:
    def hook(**kwargs: Any) -> Any:
        return method(**kwargs)

    return hook


class Tracking(nn.Module):
    """A layer whose forwards change buffers that are in its state, and others that are not."""

    mean: Tensor
    largest: Tensor
    seen: Tensor
    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("largest", torch.zeros(3), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64), persistent=False)
        self.register_buffer("table", torch.zeros(1, 3).expand(4, 3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.mean.lerp_(x.mean(0), 0.5)
            self.largest.copy_(torch.maximum(self.largest, x.amax(0)))
            self.seen.add_(len(x))
            self.table[:1].copy_(x[:1])
        result: Tensor = self.linear(x)
        return result


def buffers_on_ranks(module: nn.Module) -> list[list[Any]]:
    """Return the values of all buffers, of every rank."""
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, [buffer.tolist() for buffer in module.buffers()])
    return everyone
