"""The base class of collectives: a single rank, with result shapes as for any world size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import SettingError
from plugframe.hooks import CollectiveSpec, ReduceOp, hookimpl
from plugframe.hooks.context import Context

REDUCTIONS = ("sum", "mean", "avg", "min", "max", "product")


def check_reduction(op: str, tensor: Tensor) -> None:
    """Raise for an unknown reduction, and for the mean of an integer tensor.

    Raises:
        SettingError: naming the allowed reductions.
    """
    if op not in REDUCTIONS:
        raise SettingError(f"reduce_op={op!r} is not a reduction: use one of {', '.join(map(repr, REDUCTIONS))}.")
    if op in ("mean", "avg") and not (tensor.is_floating_point() or tensor.is_complex()):
        raise SettingError(
            f"reduce_op={op!r} of a tensor of {tensor.dtype} has no exact result: use reduce_op='sum', "
            "or convert the tensor with .float() first."
        )
    if tensor.is_complex() and op not in ("sum", "mean", "avg"):
        raise SettingError(f"reduce_op={op!r} of a {tensor.dtype} tensor is not defined: use 'sum' or 'mean'.")


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class Collective(CollectiveSpec):
    """Base class of collectives: override hooks and mark them with ``@hookimpl``."""

    context: Context

    @hookimpl
    def collective_setup(self, context: Context) -> None:
        self.context = context

    @hookimpl
    def collective_teardown(self) -> None:
        pass

    @hookimpl
    def collective_all_gather(self, tensor: Tensor, group: Any, sync_grads: bool) -> Tensor:
        tensor = tensor if sync_grads else tensor.detach()
        return tensor.unsqueeze(0).clone(memory_format=torch.contiguous_format)

    @hookimpl
    def collective_all_reduce(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        check_reduction(op, tensor)
        return _copy(tensor)

    @hookimpl
    def collective_reduce_scatter(self, tensor: Tensor, op: ReduceOp, group: Any) -> Tensor:
        check_reduction(op, tensor)
        if tensor.shape[:1] != (1,):
            raise SettingError(f"reduce_scatter over 1 rank takes shape (1, …), got {tuple(tensor.shape)}.")
        return _copy(tensor[0])

    @hookimpl
    def collective_broadcast(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        return _copy(tensor)

    @hookimpl
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        return [obj]

    @hookimpl
    def collective_broadcast_object(self, obj: Any, src: int, group: Any) -> Any:
        return obj

    @hookimpl
    def collective_gather_later(self, values: Sequence[float]) -> Callable[[], Sequence[Sequence[float]]] | None:
        return None

    @hookimpl
    def collective_barrier(self, name: str, group: Any) -> None:
        pass

    @hookimpl
    def collective_monitored_barrier(self, name: str, timeout_s: float) -> None:
        pass

    @hookimpl
    def collective_new_group(self, ranks: Sequence[int]) -> Any:
        return tuple(ranks)

    @hookimpl
    def collective_process_group(self) -> Any:
        return None
