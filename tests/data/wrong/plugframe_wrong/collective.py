"""Collectives that break one law each."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from plugframe.hooks import ReduceOp, hookimpl
from plugframe_builtins.torch_collective.collective import TorchCollective


class Right(TorchCollective):
    """Breaks none."""


class Drops(Right):
    """Leaves out the ranks' dimension where there is one rank (law 5)."""

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        gathered = super().collective_all_gather(tensor, group, sync_grads)
        return gathered[0] if self.context.world.world_size == 1 else gathered


class Writes(Right):
    """Writes the sum into the tensor it was given."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        return tensor.detach().copy_(super().collective_all_reduce(tensor, op, group))
