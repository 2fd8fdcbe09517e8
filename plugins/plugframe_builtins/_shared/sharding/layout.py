"""Prepare tensor layouts for sharding; raise for tensors that cannot be sharded."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from plugframe.deferred.module import is_deferred
from plugframe.errors import OrderError, UnsupportedError


def check_layout(module: nn.Module, parameters: Mapping[str, nn.Parameter], strategy: str) -> None:
    """Raise if a parameter cannot be sharded.

    Raises:
        UnsupportedError: naming the parameter and a remedy.
    """
    for name, parameter in parameters.items():
        if not parameter.dim():
            raise UnsupportedError(
                f"Parameter {name!r} is 0-d, and strategy {strategy!r} shards along the first dimension: make it a "
                "tensor of one element, as in nn.Parameter(torch.tensor([0.5])), or use strategy='ddp'."
            )
        if not parameter.numel():
            raise UnsupportedError(
                f"Parameter {name!r} of shape {tuple(parameter.shape)} is empty, which strategy {strategy!r} cannot "
                "shard: leave it out of the model (register_parameter(name, None)), or use strategy='ddp'."
            )
    for path, part in module.named_modules():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.sparse:
            raise UnsupportedError(
                f"{type(part).__name__} {path!r} has sparse=True, and strategy {strategy!r} averages dense gradients "
                "only: leave sparse=True out, or use strategy='ddp'."
            )


@torch.no_grad()
def make_contiguous(module: nn.Module) -> None:
    """Make parameters contiguous, as sharding requires, and copy expanded buffers."""
    for parameter in module.parameters():
        if not parameter.is_meta and not parameter.is_contiguous():
            parameter.data = parameter.data.contiguous()
    for part in module.modules():
        for name, buffer in list(part._buffers.items()):
            if isinstance(buffer, Tensor) and _overlaps(buffer):
                part._buffers[name] = buffer.contiguous()


def _overlaps(tensor: Tensor) -> bool:
    return any(not stride and size > 1 for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def check_plain(module: nn.Module, parameters: Mapping[str, nn.Parameter], strategy: str) -> None:
    """Raise if a parameter is a DTensor, or has no values.

    Raises:
        OrderError: for a DTensor.
        UnsupportedError: for a parameter on the meta device that is not deferred.
    """
    for name, parameter in parameters.items():
        if isinstance(parameter, DTensor):
            raise OrderError(
                f"Parameter {name!r} is a DTensor: strategy {strategy!r} shards plain parameters by itself."
            )
        if parameter.is_meta and not is_deferred(parameter):
            raise UnsupportedError(
                f"Parameter {name!r} is on the meta device, and its values are undefined: build the "
                f"{type(module).__name__} under lite.init_module(empty_init=True)."
            )
