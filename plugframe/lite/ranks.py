"""Between ranks: collectives with one shape law for any number of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import Tensor, nn
from torch.optim import Optimizer

from plugframe import exchange
from plugframe.base.sync import check_in_sync, check_replicated, named_tensors
from plugframe.errors import SettingError
from plugframe.lite.core import Core

T = TypeVar("T")


class Ranks(Core):
    """What ranks say to each other."""

    def all_gather(
        self,
        data: Any,
        group: Any = None,
        sync_grads: bool = False,
        *,
        pad: float | None = None,
        timeout_s: float | None = None,
    ) -> Any:
        """Return `data` with every tensor of shape S stacked over ranks: shape (ranks, *S), for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Args:
            pad: a value with which tensors of unequal shapes, of as many dimensions, are filled up to the largest.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        context = self._started("all_gather")
        self._meet("all_gather", group, timeout_s)
        gather_one = self._hooks.collective_all_gather

        def one(tensor: Tensor) -> Tensor:
            if pad is not None:
                tensor = exchange.padded(tensor, pad, self._hooks, group)
            return cast(Tensor, gather_one(tensor=tensor, group=group, sync_grads=sync_grads))

        return exchange.each(one, data, context.device, "all_gather")

    def all_reduce(
        self, data: Any, group: Any = None, reduce_op: str = "mean", *, timeout_s: float | None = None
    ) -> Any:
        """Return `data` with every tensor reduced over ranks, of the same shape, for one rank too.

        Every rank of the group must call it, with equal shapes and dtypes. Numbers and arrays become tensors.

        Args:
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product".
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        context = self._started("all_reduce")
        self._meet("all_reduce", group, timeout_s)
        reduce_one = self._hooks.collective_all_reduce

        def one(tensor: Tensor) -> Tensor:
            return cast(Tensor, reduce_one(tensor=tensor, op=reduce_op.lower(), group=group))

        return exchange.each(one, data, context.device, "all_reduce")

    def broadcast(self, obj: T, src: int = 0, *, timeout_s: float | None = None) -> T:
        """Return global rank `src`'s object, its tensors on this rank's device. Every rank must call it.

        Args:
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        context = self._started("broadcast")
        if not 0 <= src < self.world_size:
            raise SettingError(f"broadcast(src={src!r}): ranks go from 0 to {self.world_size - 1}.")
        self._meet("broadcast", None, timeout_s)
        sent = self._hooks.collective_broadcast_object(obj=exchange.off_device(obj), src=src, group=None)
        return cast("T", exchange.on_device(sent, context.device))

    def barrier(self, name: str | None = None, *, timeout_s: float | None = None) -> None:
        """Return once every rank is here. Every rank must call it.

        Args:
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        self._started("barrier")
        self._phase.weights.met = True
        if timeout_s is None:
            self._hooks.collective_barrier(name=name or "", group=None)
        else:
            self._meet(name or "barrier", None, timeout_s)

    def assert_in_sync(self, *objects: nn.Module | Optimizer) -> None:
        """Check that parameters, and the state of optimizers, are bit for bit the same on all ranks.

        Every rank must call it.

        Args:
            objects: modules and optimizers; without, every module that was set up.

        Raises:
            OutOfSyncError: on all ranks, naming the first that differs and the ranks that have another one.
            UnsupportedError: under a strategy that keeps a part of the model on each rank: nothing is there twice.
        """
        self._started("assert_in_sync")
        check_replicated(self.plan.choices["strategy"].descriptor.provides, "assert_in_sync()")
        modules = [obj for obj in objects or self._living() if isinstance(obj, nn.Module)]
        optimizers = [obj for obj in objects if isinstance(obj, Optimizer)]
        if len(modules) + len(optimizers) < len(objects):
            raise SettingError("assert_in_sync() takes modules and optimizers.")
        check_in_sync(named_tensors(modules, optimizers), self._hooks)

    def _meet(self, call: str, group: Any, timeout_s: float | None) -> None:
        """Wait for the other ranks, if it is said for how long: then what follows waits for nobody."""
        self._phase.weights.exchanged()
        if timeout_s is None:
            return
        if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
            raise SettingError(f"{call}(timeout_s={timeout_s!r}): it is a number of seconds above 0.")
        if group is not None:
            raise SettingError(f"{call}(timeout_s=…) waits for all ranks, and group= is given: leave one of them out.")
        self._hooks.collective_monitored_barrier(name=call, timeout_s=float(timeout_s))

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
