"""Collectives that break one law each."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.base import Collective
from plugframe.errors import CollectiveMismatchError
from plugframe.hooks import ReduceOp, hookimpl
from plugframe.hooks.context import Context
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


class Joins(Right):
    """Puts the ranks' tensors one behind the other (law 5)."""

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        gathered = super().collective_all_gather(tensor, group, sync_grads)
        return gathered.flatten(0, 1) if tensor.dim() else gathered


class Adds(Right):
    """Takes a mean for a sum."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        return super().collective_all_reduce(tensor, "sum" if op == "mean" else op, group)


class Terse(Right):
    """Raises a mismatch whose message differs between ranks."""

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        try:
            return super().collective_all_gather(tensor, group, sync_grads)
        except CollectiveMismatchError:
            rank = self.context.world.global_rank
            raise CollectiveMismatchError(f"Rank {rank} sends {tuple(tensor.shape)}, and others do not.") from None


class Rounds(Right):
    """Gives the mean of whole numbers, rounded."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        work = tensor.double() if op == "mean" else tensor
        return super().collective_all_reduce(work, op, group).to(tensor.dtype)


class Cuts(Right):
    """Sends no gradient to another rank: each gets that of its own row."""

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        rows = list(super().collective_all_gather(tensor, group, False))
        if sync_grads:
            rows[self.context.world.global_rank] = tensor
        return torch.stack(rows)


class Reverses(Right):
    """Gives the objects of the last rank first."""

    @hookimpl
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        return super().collective_all_gather_object(obj, group)[::-1]


class Everyone(Right):
    """Has one group, of all ranks."""

    @hookimpl
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        return None


class Passes(Right):
    """Waits at no barrier."""

    @hookimpl
    def collective_barrier(self, name: str, group: Any) -> None:
        pass


class Nameless(Right):
    """Does not say who is missing at a barrier."""

    @hookimpl
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        try:
            super().collective_monitored_barrier(name, timeout_s)
        except RuntimeError:
            raise RuntimeError("The barrier timed out.") from None


class Alone(Right):
    """Goes on by itself where the others do not come."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        try:
            return super().collective_all_reduce(tensor, op, group)
        except RuntimeError:
            return tensor.clone()


class Hides(Right):
    """Has a process group, and does not give it."""

    @hookimpl
    def collective_process_group(self) -> Any:
        return None


class Wide(Right):
    """Listens to everybody."""

    server: socket.socket | None = None

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        super().collective_setup(context)
        self.server = socket.create_server(("", 0))

    @hookimpl
    def collective_teardown(self) -> None:
        if self.server is not None:
            self.server.close()
        super().collective_teardown()


class Leaves(Right):
    """Sets a variable and leaves it (law 9)."""

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        super().collective_setup(context)
        os.environ["WRONG_COLLECTIVE"] = str(int(os.environ.get("WRONG_COLLECTIVE", "0")) + 1)


class Single(Collective):
    """Works with one rank only, and says so of no other number."""
