"""Shard a module, and materialise deferred parameters, one submodule at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.deferred.module import is_deferred, materialize_module
from plugframe.hooks.context import Context
from plugframe_builtins.deepspeed.library import library
from plugframe_builtins.deepspeed.rounding import Rounding
from plugframe_builtins.deepspeed.runtime import variables_of

#: By a parameter's id, this rank's elements of it before rounding.
Pieces = dict[int, Tensor]


def has_deferred(module: nn.Module) -> bool:
    """Return whether a parameter of the module is deferred."""
    return any(is_deferred(parameter) for parameter in module.parameters())


@torch.no_grad()
def partition(
    module: nn.Module,
    context: Context,
    config: dict[str, Any],
    *,
    dtype: torch.dtype | None,
    broadcast: Callable[[Tensor], None],
    rounding: Rounding,
) -> Pieces:
    """Give the module's tensors rank 0's values, and shard its parameters. Every rank must call it.

    Args:
        config: DeepSpeed's, for stage 3.
        dtype: dtype for float32 parameters, None to keep them.
        broadcast: broadcasts rank 0's values of a tensor.
        rounding: notes frozen parameters that `dtype` rounds.

    Returns:
        The float32 elements, if `dtype` is another.
    """
    pieces: Pieces = {}
    first: Any = None
    ranks, rank = context.world.world_size, context.world.global_rank
    for part in _inner_first(module):
        materialize_module(part, context.device)
        for buffer in part.buffers(recurse=False):
            broadcast(buffer)
        own = [p for p in part.parameters(recurse=False) if not hasattr(p, "ds_id")]
        for parameter in own:
            if dtype not in (None, parameter.dtype) and parameter.dtype is torch.float32:
                broadcast(parameter)
                if parameter.requires_grad:
                    pieces[id(parameter)] = _piece(parameter, rank, ranks)
                else:
                    rounding.note(parameter)
                parameter.data = parameter.data.to(dtype)
        if own and first is None:
            first = own[0]
            with variables_of(context), _with_dimension(own):
                library("runtime.zero").Init(module=nn.ParameterList(own), config_dict_or_path=config)
        elif own:
            with _with_dimension(own):
                first.convert_to_zero_parameters(param_list=own)
    return pieces


@contextmanager
def _with_dimension(parameters: list[Any]) -> Iterator[None]:
    """Show scalars to DeepSpeed as tensors of one element: it does not support 0-d tensors."""
    scalars = [parameter for parameter in parameters if parameter.dim() == 0]
    for parameter in scalars:
        parameter.data = parameter.data.reshape(1)
    yield
    for parameter in scalars:
        parameter.ds_shape = torch.Size()


@contextmanager
def sent_already(module: nn.Module) -> Iterator[None]:
    """Exclude scalars from DeepSpeed's broadcasts, which do not support them: they are equal on all ranks."""
    scalars: list[Any] = [parameter for parameter in module.parameters() if parameter.dim() == 0]
    for parameter in scalars:
        parameter.ds_status = None
    try:
        yield
    finally:
        for parameter in scalars:
            del parameter.ds_status


def _inner_first(module: nn.Module) -> Iterator[nn.Module]:
    seen: set[int] = set()

    def walk(part: nn.Module) -> Iterator[nn.Module]:
        seen.add(id(part))
        for child in part.children():
            if id(child) not in seen:
                yield from walk(child)
        yield part

    return walk(module)


def _piece(parameter: Tensor, rank: int, ranks: int) -> Tensor:
    flat = parameter.detach().reshape(-1)
    size = -(-flat.numel() // ranks)
    return flat[min(rank * size, flat.numel()) : (rank + 1) * size].clone()
