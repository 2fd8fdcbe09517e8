"""Between ranks: collectives with one shape law for any number of them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar, cast

from torch import nn
from torch.optim import Optimizer

from plugframe.base import warn_caller
from plugframe.diagnostics.replicas import check_in_sync, check_replicated, named_tensors
from plugframe.errors import SettingError
from plugframe.lite import collectives
from plugframe.lite.core import Core
from plugframe.lite.reductions import is_dropped, operation, reduce_tensor, why_not_in_place

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
        as_object: bool = False,
        timeout_s: float | None = None,
    ) -> Any:
        """Return `data` with every tensor of shape S stacked over ranks: shape (ranks, *S), for one rank too.

        Numbers and arrays become tensors and are stacked too; any other object that can be pickled (a string, None)
        becomes the list of what the ranks have in its place. Dictionaries go by key, in any order. Every rank of the
        group must call it, with equal keys, lengths, types, shapes and dtypes.

        Args:
            sync_grads: whether gradients flow back through the result, to the input of every rank.
            pad: a value with which tensors of unequal shapes, of as many dimensions, are filled up to the largest.
            as_object: whether `data` is taken as one object, whatever is in it, and the list of those returned: what
                ranks have may differ then.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if keys, shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        context = self._started("all_gather")
        self._meet("all_gather", group, timeout_s)
        hooks, device = self._hooks, context.device
        if as_object:
            everyone = hooks.collective_all_gather_object(obj=collectives.off_device(data), group=group)
            return [collectives.on_device(each, device) for each in everyone]
        if pad is None and collectives.is_whole(data):
            return hooks.collective_all_gather(tensor=data, group=group, sync_grads=sync_grads)
        return collectives.gather(data, hooks, group, device, sync_grads=sync_grads, pad=pad)

    def all_reduce(
        self, data: Any, group: Any = None, reduce_op: Any = "mean", *, timeout_s: float | None = None
    ) -> Any:
        """Return `data` with every tensor reduced over ranks, of the same shape, for one rank too.

        A tensor without a graph is reduced in place and returned, as torch and Fabric do. One with a graph stays as
        it is, and gradients flow back through the new one to the input of every rank; every rank must then call
        backward. Numbers and arrays become tensors. The dtype of the result, of which those in brackets are new
        tensors and not reduced in place:

        ==========================  ==================  =================  ========
        passed                      sum, product        mean               min, max
        ==========================  ==================  =================  ========
        float32, float64, complex   the same            the same           the same
        float16, bfloat16, float8   (float32)           the same           the same
        int64                       the same            (float64)          the same
        other integers, bool        (int64)             (float64)          the same
        Python float, complex       float64             float64            float64
        Python int, bool            int64               float64            the same
        ==========================  ==================  =================  ========

        Half precision is added up in float32; where a sum is returned in float32, the tensor passed holds it rounded.
        Sums of int64 tensors wrap beyond 64 bits, as in torch. Expanded tensors are not reduced in place.

        Dictionaries go by key, in any order. Every rank of the group must call it, with equal keys, lengths, types,
        shapes and dtypes.

        Args:
            reduce_op: "mean" (or "avg"), "sum", "min", "max", "product", or one of `torch.distributed.ReduceOp`.
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.

        Raises:
            CollectiveMismatchError: if keys, shapes or dtypes differ, on all ranks, listing them.
            CollectiveTimeoutError: if a rank does not come in time, saying where every rank is.
        """
        context = self._started("all_reduce")
        op = operation(reduce_op)
        self._meet("all_reduce", group, timeout_s)
        if collectives.is_whole(data):
            result = reduce_tensor(data, op, self._hooks, group)
        else:
            result = collectives.reduce(data, op, self._hooks, group, context.device)
        if result is not data and is_dropped(sys._getframe(1)) and not isinstance(data, (int, float, complex)):
            warn_caller(
                "lite.all_reduce() could not reduce this in place, and its result is not used: write "
                f"x = lite.all_reduce(x). {why_not_in_place(data)}"
            )
        return result

    def broadcast(self, obj: T, src: int = 0, *, timeout_s: float | None = None) -> T:
        """Return global rank `src`'s object, its tensors on this rank's device. Every rank must call it.

        Any object that can be pickled; what the other ranks pass is not looked at. One that cannot is an error on all
        ranks.

        Args:
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        context = self._started("broadcast")
        if not 0 <= src < self.world_size:
            raise SettingError(f"broadcast(src={src!r}): ranks go from 0 to {self.world_size - 1}.")
        self._meet("broadcast", None, timeout_s)
        # A simulated source has what this rank has.
        sent = collectives.off_device(obj) if src == self.global_rank or self.plan.simulated else None
        found = self._hooks.collective_broadcast_object(obj=sent, src=src, group=None)
        return cast("T", collectives.on_device(found, context.device))

    def barrier(self, name: str | None = None, *, timeout_s: float | None = None) -> None:
        """Return once every rank is here. Every rank must call it.

        Args:
            timeout_s: seconds to wait for the other ranks, in place of what the job allows; equal on all ranks.
        """
        self._started("barrier")
        self._phase.weights.communicated = True
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
        self._phase.weights.on_collective()
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
