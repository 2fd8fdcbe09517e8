"""Collective methods of `Lite`, with the same result shapes for any world size."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from plugframe.diagnostics.replicas import check_in_sync, check_replicated, named_tensors
from plugframe.errors import SettingError
from plugframe.lite import collectives
from plugframe.lite.reductions import is_dropped, operation, reduce_tensor, why_not_in_place
from plugframe.utils.logging import warn_caller

if TYPE_CHECKING:
    from plugframe.lite.lite import Lite


def all_gather(
    lite: Lite,
    data: Any,
    group: Any,
    *,
    sync_grads: bool,
    pad: float | None,
    as_object: bool,
    timeout_s: float | None,
) -> Any:
    """Return `data` with every tensor stacked over ranks; see `Lite.all_gather`."""
    context = lite._started("all_gather")
    _meet(lite, "all_gather", group, timeout_s)
    hooks, device = lite._hooks, context.device
    if as_object:
        everyone = hooks.collective_all_gather_object(obj=collectives.off_device(data), group=group)
        return [collectives.on_device(each, device) for each in everyone]
    if pad is None and collectives.is_whole(data):
        return hooks.collective_all_gather(tensor=data, group=group, sync_grads=sync_grads)
    return collectives.gather(data, hooks, group, device, sync_grads=sync_grads, pad=pad)


def all_reduce(lite: Lite, data: Any, group: Any, reduce_op: Any, *, timeout_s: float | None) -> Any:
    """Return `data` with every tensor reduced over ranks; see `Lite.all_reduce`, by which alone it is called."""
    context = lite._started("all_reduce")
    op = operation(reduce_op)
    _meet(lite, "all_reduce", group, timeout_s)
    if collectives.is_whole(data):
        result = reduce_tensor(data, op, lite._hooks, group)
    else:
        result = collectives.reduce(data, op, lite._hooks, group, context.device)
    # The frame of the method's caller.
    if result is not data and is_dropped(sys._getframe(2)) and not isinstance(data, (int, float, complex)):
        warn_caller(
            "lite.all_reduce() could not reduce this in place, and its result is not used: write "
            f"x = lite.all_reduce(x). {why_not_in_place(data)}"
        )
    return result


def broadcast(lite: Lite, obj: Any, src: int, *, timeout_s: float | None) -> Any:
    """Return global rank `src`'s object, its tensors on this rank's device."""
    context = lite._started("broadcast")
    if not 0 <= src < lite.world_size:
        raise SettingError(f"broadcast(src={src!r}): ranks go from 0 to {lite.world_size - 1}.")
    _meet(lite, "broadcast", None, timeout_s)
    # A simulated source has what this rank has.
    sent = collectives.off_device(obj) if src == lite.global_rank or lite.plan.simulated else None
    found = lite._hooks.collective_broadcast_object(obj=sent, src=src, group=None)
    return collectives.on_device(found, context.device)


def barrier(lite: Lite, name: str | None, *, timeout_s: float | None) -> None:
    """Return once every rank has called it."""
    lite._started("barrier")
    lite._job_state.weights.communicated = True
    if timeout_s is None:
        lite._hooks.collective_barrier(name=name or "", group=None)
    else:
        _meet(lite, name or "barrier", None, timeout_s)


def assert_in_sync(lite: Lite, objects: Sequence[object]) -> None:
    """Check that parameters and optimizer states are bitwise equal on all ranks."""
    lite._started("assert_in_sync")
    check_replicated(lite.plan.choices["strategy"].descriptor.provides, "assert_in_sync()")
    modules = [obj for obj in objects if isinstance(obj, nn.Module)]
    optimizers = [obj for obj in objects if isinstance(obj, Optimizer)]
    if len(modules) + len(optimizers) < len(objects):
        raise SettingError("assert_in_sync() takes modules and optimizers.")
    check_in_sync(lambda: named_tensors(modules if objects else lite._living(), optimizers), lite._hooks)


@contextmanager
def rank_zero_first(lite: Lite, *, local: bool) -> Iterator[None]:
    """Run the block on rank 0 (of each node, if `local`) before all others."""
    lite._started("rank_zero_first")
    first = (lite.local_rank if local else lite.global_rank) == 0
    if not first:
        lite.barrier("rank_zero_first")
    try:
        yield
    finally:
        if first:
            lite.barrier("rank_zero_first")


def _meet(lite: Lite, call: str, group: Any, timeout_s: float | None) -> None:
    """Wait for the other ranks if a timeout is given, so that the following collective does not block."""
    lite._job_state.weights.on_collective()
    if timeout_s is None:
        return
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not timeout_s > 0:
        raise SettingError(f"{call}(timeout_s={timeout_s!r}): it is a number of seconds above 0.")
    if group is not None:
        raise SettingError(f"{call}(timeout_s=…) waits for all ranks, and group= is given: leave one of them out.")
    lite._hooks.collective_monitored_barrier(name=call, timeout_s=float(timeout_s))
