"""Refuse what layers that are split over a tensor group cannot do."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from plugframe.base import map_tensors
from plugframe.errors import SettingError, UnsupportedError
from plugframe_builtins._shared.fully_shard.module_hook import Hook

#: The dimension of a linear layer's weight that a style splits, and what it is called.
_SPLIT = {
    **dict.fromkeys(("colwise", "colwise_gather", "colwise_rep", "colwise_gather_output"), (0, "out_features")),
    **dict.fromkeys(("rowwise", "rowwise_rep"), (1, "in_features")),
}


def check_divisible(styles: Mapping[str, Any], module: nn.Module, num_ranks: int, where: str) -> None:
    """Raise if a linear layer cannot be split evenly: torch fails in the middle of a forward (torch 2.13).

    Args:
        styles: style by path, as a name or an object; objects are not checked.
        num_ranks: ranks of the tensor group.

    Raises:
        SettingError: naming the layer and its size.
    """
    for path, style in styles.items():
        layer = module.get_submodule(path)
        if not isinstance(layer, nn.Linear) or not isinstance(style, str) or style not in _SPLIT:
            continue
        dim, name = _SPLIT[style]
        size = layer.weight.shape[dim]
        if size % num_ranks:
            raise SettingError(
                f"{where} splits {path!r} {style} over {num_ranks} ranks, and its {name}={size} is no multiple of "
                f"{num_ranks}: leave it out of the plan, or use a tensor axis that divides it."
            )


def refuse_second_derivatives(layers: Mapping[str, nn.Module]) -> None:
    """Have a gradient with ``create_graph=True`` raise where it passes a split layer.

    torch's redistribution between the ranks of a tensor group is not differentiated twice: the second derivatives would
    lack what other ranks contribute (torch 2.13).
    """
    for path, layer in layers.items():
        layer.register_forward_hook(Hook(functools.partial(_attach, path)))


def _attach(path: str, layer: nn.Module, args: Any, output: Any) -> None:
    def check(_: Tensor) -> None:
        if torch.is_grad_enabled():
            raise UnsupportedError(
                f"A gradient through {type(layer).__name__} {path!r} is computed with create_graph=True, and strategy "
                "'tensor_parallel' cannot differentiate a split layer twice: use strategy='fsdp' or 'ddp'."
            )

    def attach(tensor: Tensor) -> Tensor:
        if tensor.requires_grad:
            tensor.register_hook(check)  # type: ignore[no-untyped-call]
        return tensor

    if torch.is_grad_enabled():
        map_tensors(attach, output)
