"""Between ranks: collectives with one shape law for any number of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor

from plugframe import exchange
from plugframe.errors import SettingError
from plugframe.lite.core import Core

T = TypeVar("T")


class Ranks(Core):
    """What ranks say to each other."""

    def all_gather(self, data: Any, group: Any = None, sync_grads: bool = False) -> Any:
        """Return `data` with every tensor of shape S stacked over ranks: shape (ranks, *S), for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
        """
        context = self._started("all_gather")
        gather_one = self._hooks.collective_all_gather

        def one(tensor: Tensor) -> Tensor:
            return cast(Tensor, gather_one(tensor=tensor, group=group, sync_grads=sync_grads))

        return exchange.each(one, data, context.device, "all_gather")

    def all_reduce(self, data: Any, group: Any = None, reduce_op: str = "mean") -> Any:
        """Return `data` with every tensor reduced over ranks, of the same shape, for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Args:
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product".

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
        """
        context = self._started("all_reduce")
        reduce_one = self._hooks.collective_all_reduce

        def one(tensor: Tensor) -> Tensor:
            return cast(Tensor, reduce_one(tensor=tensor, op=reduce_op.lower(), group=group))

        return exchange.each(one, data, context.device, "all_reduce")

    def broadcast(self, obj: T, src: int = 0) -> T:
        """Return global rank `src`'s object, its tensors on this rank's device. Every rank must call it."""
        context = self._started("broadcast")
        if not 0 <= src < self.world_size:
            raise SettingError(f"broadcast(src={src!r}): ranks go from 0 to {self.world_size - 1}.")
        sent = self._hooks.collective_broadcast_object(obj=exchange.off_device(obj), src=src, group=None)
        return cast("T", exchange.on_device(sent, context.device))

    def barrier(self, name: str | None = None) -> None:
        """Return once every rank is here. Every rank must call it."""
        self._started("barrier")
        self._hooks.collective_barrier(name=name or "", group=None)

    @contextmanager
    def rank_zero_first(self, local: bool = False) -> Iterator[None]:
        """Let rank 0 (of each node, if `local`) run what is inside before all others. Every rank must enter it."""
        self._started("rank_zero_first")
        first = (self.local_rank if local else self.global_rank) == 0
        if not first:
            self.barrier("rank_zero_first")
        try:
            yield
        finally:
            if first:
                self.barrier("rank_zero_first")

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print on global rank 0 alone."""
        if self.is_global_zero:
            print(*args, **kwargs)
