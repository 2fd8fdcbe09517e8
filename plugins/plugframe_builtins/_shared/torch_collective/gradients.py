"""Gradients through collectives that are linear maps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Map = Callable[[Tensor], Tensor]


def linear(tensor: Tensor, apply: Map, transpose: Map) -> Tensor:
    """Return ``apply(tensor)``; its backward is `transpose`, whose own backward is `apply`, and so on.

    Args:
        apply: a linear map over the ranks, such as an all-gather.
        transpose: its transpose, such as a reduce-scatter by sum.
    """
    result: Tensor = _Linear.apply(tensor, apply, transpose)  # type: ignore[no-untyped-call]
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, apply: Map, transpose: Map) -> Tensor:
        ctx.maps = apply, transpose
        return apply(tensor)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        apply, transpose = ctx.maps
        return linear(grads[0], transpose, apply), None, None
