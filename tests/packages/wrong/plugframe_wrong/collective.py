"""Collectives that break one law each."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base import Collective
from plugframe.errors import CollectiveMismatchError, UnsupportedError
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


class Swaps(Right):
    """Takes the minimum for the maximum."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        return super().collective_all_reduce(tensor, "min" if op == "max" else op, group)


class Sums(Right):
    """Sums where each rank is to get the mean of its rows."""

    @hookimpl
    def collective_reduce_scatter(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        return super().collective_reduce_scatter(tensor, "sum" if op in ("mean", "avg") else op, group)


class Widens(Right):
    """Loses the dtype of what it reduces."""

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        found = super().collective_all_reduce(tensor, op, group)
        return found.float() if tensor.dtype in (torch.float16, torch.bfloat16) else found


class Turns(Right):
    """Gathers the tensor of the last rank first."""

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        return super().collective_all_gather(tensor, group, sync_grads).flip(0)


class Indexes(Right):
    """Takes `src` for the position in the group."""

    @hookimpl
    def collective_broadcast(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        return super().collective_broadcast(tensor, _member(group, src), group)


class Positions(Right):
    """Takes the `src` of a scatter for the position in the group."""

    @hookimpl
    def collective_scatter(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        return super().collective_scatter(tensor, _member(group, src), group)


def _member(group: Any, position: int) -> int:
    return dist.get_process_group_ranks(group or dist.group.WORLD)[position]


class Converts(Right):
    """Loses the dtype of what it receives."""

    @hookimpl
    def collective_recv(self, tensor: Tensor, src: int, tag: int, group: Any) -> Tensor:
        return super().collective_recv(tensor, src, tag, group).float()


class Invents(Right):
    """Receives zeros where the other rank sends something else."""

    @hookimpl
    def collective_recv(self, tensor: Tensor, src: int, tag: int, group: Any) -> Tensor:
        try:
            return super().collective_recv(tensor, src, tag, group)
        except CollectiveMismatchError:
            return torch.zeros_like(tensor)


class Pretends(Right):
    """Returns from a send that nobody has received."""

    @hookimpl
    def collective_send(self, tensor: Tensor, dst: int, tag: int, group: Any) -> None:
        pass


class Shuffles(Right):
    """Gives the rows of the last rank first."""

    @hookimpl
    def collective_all_to_all(
        self, tensor: Tensor, output_sizes: Any, input_sizes: Any, group: Any, sync_grads: bool
    ) -> Tensor:
        return super().collective_all_to_all(tensor, output_sizes, input_sizes, group, sync_grads).flip(0)


class Keeps(Right):
    """Sends every rank the rows of the first one, where there are sizes."""

    @hookimpl
    def collective_all_to_all(
        self, tensor: Tensor, output_sizes: Any, input_sizes: Any, group: Any, sync_grads: bool
    ) -> Tensor:
        found = super().collective_all_to_all(tensor, output_sizes, input_sizes, group, sync_grads)
        return found if output_sizes is None else found[:1].expand_as(found).contiguous()


class Fits(Right):
    """Sends what fits, where the ranks' shapes differ."""

    @hookimpl
    def collective_all_to_all(
        self, tensor: Tensor, output_sizes: Any, input_sizes: Any, group: Any, sync_grads: bool
    ) -> Tensor:
        try:
            return super().collective_all_to_all(tensor, output_sizes, input_sizes, group, sync_grads)
        except CollectiveMismatchError:
            return tensor.clone()


class Detaches(Right):
    """Sends rows, and no gradients back."""

    @hookimpl
    def collective_all_to_all(
        self, tensor: Tensor, output_sizes: Any, input_sizes: Any, group: Any, sync_grads: bool
    ) -> Tensor:
        found = super().collective_all_to_all(tensor, output_sizes, input_sizes, group, False)
        return found.requires_grad_(sync_grads and tensor.requires_grad)


class Anonymous(Right):
    """Does not say which hook it lacks."""

    @hookimpl
    def collective_all_to_all(
        self, tensor: Tensor, output_sizes: Any, input_sizes: Any, group: Any, sync_grads: bool
    ) -> Tensor:
        raise UnsupportedError("This collective cannot do this.")


class First(Right):
    """Gives every rank the first row."""

    @hookimpl
    def collective_scatter(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        rows = tensor[:1].expand_as(tensor) if dist.get_rank() == src else tensor
        return super().collective_scatter(rows, src, group)


class Spreads(Right):
    """Gives the objects to every rank."""

    @hookimpl
    def collective_gather_object(self, obj: Any, dst: int, group: Any) -> list[Any] | None:
        return super().collective_all_gather_object(obj, group)


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
