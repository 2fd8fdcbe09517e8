"""The base class of collectives: a single rank, with result shapes as for any world size."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import SettingError, UnsupportedError
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


def check_split(
    tensor: Tensor, size: int, output_sizes: Sequence[int] | None, input_sizes: Sequence[int] | None
) -> tuple[list[int], list[int]] | None:
    """Return the sizes of an all-to-all over `size` ranks as two lists, None for an even split.

    Raises:
        SettingError: if they do not fit `tensor` or the number of ranks.
    """
    shape = tuple(tensor.shape)
    if output_sizes is None and input_sizes is None:
        if shape[:1] != (size,):
            raise SettingError(f"all_to_all over {size} ranks takes shape ({size}, …) without sizes, got {shape}.")
        return None
    if output_sizes is None or input_sizes is None:
        raise SettingError("all_to_all takes both output_sizes= and input_sizes=, or neither for an even split.")
    sizes = [_sizes("output_sizes", output_sizes, size), _sizes("input_sizes", input_sizes, size)]
    if not shape or sum(sizes[1]) != shape[0]:
        raise SettingError(f"all_to_all with input_sizes={sizes[1]} takes shape ({sum(sizes[1])}, …), got {shape}.")
    return sizes[0], sizes[1]


def _sizes(name: str, sizes: Sequence[int], size: int) -> list[int]:
    try:
        found = [operator.index(each) for each in sizes]
    except TypeError:
        found = []
    if len(found) != size or any(each < 0 for each in found):
        raise SettingError(f"{name}={sizes!r} of all_to_all is not {size} numbers of rows from 0, one for each rank.")
    return found


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)


class Collective(CollectiveSpec):
    """Base class of collectives: override hooks and mark them with ``@hookimpl``.

    Its own hooks are those of one rank. The hooks added in contract 2 (`collective_send`, `collective_recv`,
    `collective_all_to_all`, `collective_scatter`, `collective_gather_object`) raise an `UnsupportedError` with more.
    """

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
    def collective_send(self, tensor: Tensor, dst: int, tag: int, group: Any) -> None:
        self._check_one_rank("collective_send")
        raise SettingError(f"dst={dst}: this job has one rank, which cannot send to itself.")

    @hookimpl
    def collective_recv(self, tensor: Tensor, src: int, tag: int, group: Any) -> Tensor:
        self._check_one_rank("collective_recv")
        raise SettingError(f"src={src}: this job has one rank, which cannot receive from itself.")

    @hookimpl
    def collective_all_to_all(
        self,
        tensor: Tensor,
        output_sizes: Sequence[int] | None,
        input_sizes: Sequence[int] | None,
        group: Any,
        sync_grads: bool,
    ) -> Tensor:
        self._check_one_rank("collective_all_to_all")
        sizes = check_split(tensor, 1, output_sizes, input_sizes)
        if sizes is not None and sizes[0] != sizes[1]:
            raise SettingError(f"all_to_all over 1 rank takes equal sizes, got output {sizes[0]} and input {sizes[1]}.")
        return (tensor if sync_grads else tensor.detach()).clone(memory_format=torch.contiguous_format)

    @hookimpl
    def collective_scatter(self, tensor: Tensor, src: int, group: Any) -> Tensor:
        self._check_one_rank("collective_scatter", src=src)
        if tensor.shape[:1] != (1,):
            raise SettingError(f"scatter over 1 rank takes shape (1, …), got {tuple(tensor.shape)}.")
        return _copy(tensor[0])

    @hookimpl
    def collective_all_gather_object(self, obj: Any, group: Any) -> list[Any]:
        return [obj]

    @hookimpl
    def collective_gather_object(self, obj: Any, dst: int, group: Any) -> list[Any] | None:
        self._check_one_rank("collective_gather_object", dst=dst)
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

    def _check_one_rank(self, hook: str, **ranks: int) -> None:
        """Raise with more than one rank: a collective of contract 1 does not override the hook; and for another rank.

        Raises:
            UnsupportedError: naming the collective and the hook.
            SettingError: naming the argument that is not the rank of this job.
        """
        context: Context | None = getattr(self, "context", None)
        if context is None or context.world.world_size > 1:
            name = type(self).__name__ if context is None else context.names.get("collective", type(self).__name__)
            found = "it is not set up" if context is None else f"this job has {context.world.world_size} ranks"
            raise UnsupportedError(
                f"The collective {name} does not implement {hook}, and {found}: upgrade its package, or use another."
            )
        for argument, rank in ranks.items():
            if rank != context.world.global_rank:
                raise SettingError(f"{argument}={rank} is not a rank of this job, which has rank 0 only.")
