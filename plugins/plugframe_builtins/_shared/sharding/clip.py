"""Clip sharded gradients: limits apply to the gradients of the full model, over all axes of the mesh."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate
from torch.nn.utils import get_total_norm

from plugframe.errors import SettingError
from plugframe.hooks.context import Context


def clip_by_value(parameters: Sequence[Tensor], limit: float) -> None:
    """Clamp every element of the gradients to ``[-limit, limit]``, in place, without communication."""
    for gradient in _gradients(parameters):
        _local(gradient).clamp_(-limit, limit)


def clip_by_norm(
    parameters: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
    context: Context,
    num_parts: int = 1,
) -> Tensor:
    """Scale the gradients so that their total norm is at most `max_norm`; return the norm before, a 0-d tensor.

    Every rank must call it. An element counts once, on however many ranks it is.

    Args:
        num_parts: into how many parts (stages) the model is cut, each on as many ranks; those of a part have its
            shards.

    Raises:
        SettingError: for an order that is not above 0.
        RuntimeError: if the norm is not finite and `error_if_nonfinite`.
    """
    if not norm_type > 0:
        raise SettingError(f"norm_type={norm_type:g}: the norm of shards is defined for orders above 0, inf included.")
    gradients = _gradients(parameters)
    total = _total_norm(gradients, norm_type, context, num_parts)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type:g} of the gradients is non-finite ({total.item()}), so they cannot be "
            "clipped. To clip them nevertheless, pass error_if_nonfinite=False."
        )
    # As in torch.nn.utils.clip_grad_norm_: 1e-6 avoids a division by zero.
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        _local(gradient).mul_(scale.to(gradient.device, gradient.dtype))
    return total


def _total_norm(gradients: Sequence[Tensor], norm_type: float, context: Context, num_parts: int) -> Tensor:
    """Return the norm of all gradients on all ranks, with one reduction.

    torch's own total norm of DTensors reduces each dimension of the mesh by itself, with a warning (torch 2.13).
    """
    groups: dict[int, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(_num_copies(gradient, context, num_parts), []).append(_local(gradient))
    dtype = gradients[0].dtype if gradients else torch.get_default_dtype()
    # In float64: the norm is raised to a power.
    total = torch.zeros((), dtype=torch.float64, device=context.device)
    for copies, parts in groups.items():
        parts = [part for part in parts if part.numel()]  # torch fails on the largest of no elements
        norm = get_total_norm(parts, norm_type).to(context.device, torch.float64) if parts else torch.zeros_like(total)
        total = torch.maximum(total, norm) if math.isinf(norm_type) else total + norm**norm_type / copies
    op: Any = "max" if math.isinf(norm_type) else "sum"
    found: Tensor = context.hooks.collective_all_reduce(tensor=total, op=op, group=None)
    return (found if math.isinf(norm_type) else torch.pow(found, 1 / norm_type)).to(dtype)


def _num_copies(gradient: Tensor, context: Context, num_parts: int) -> int:
    """Return how many ranks of the job hold each element of a gradient's local part."""
    ranks = context.world.world_size
    if not isinstance(gradient, DTensor):
        return ranks
    mesh = gradient.device_mesh
    placed = zip(gradient.placements, range(mesh.ndim), strict=True)
    copies = math.prod(mesh.size(dim) for placement, dim in placed if isinstance(placement, Replicate))
    return copies * (ranks // num_parts // mesh.size())


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    for parameter in parameters:
        gradient = parameter.grad
        if isinstance(gradient, DTensor) and any(isinstance(placement, Partial) for placement in gradient.placements):
            # What a norm of sums is cannot be seen from the summands.
            parameter.grad = gradient.redistribute(placements=parameter.placements)  # type: ignore[attr-defined]
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
