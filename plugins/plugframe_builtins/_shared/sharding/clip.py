"""Clip sharded gradients: limits apply to the gradients of the full model."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial
from torch.nn.utils import get_total_norm


def clip_by_value(parameters: Sequence[Tensor], limit: float) -> None:
    """Clamp every element of the gradients to ``[-limit, limit]``, in place, without communication."""
    for gradient in _gradients(parameters):
        _local(gradient).clamp_(-limit, limit)


def clip_by_norm(parameters: Sequence[Tensor], max_norm: float, norm_type: float, error_if_nonfinite: bool) -> Tensor:
    """Scale the gradients so that their total norm is at most `max_norm`; return the norm before, a 0-d tensor.

    Every rank must call it. Gradients on different meshes, or on none, count once each.

    Raises:
        RuntimeError: if the norm is not finite and `error_if_nonfinite`.
    """
    gradients = _gradients(parameters)
    total = _total_norm(gradients, norm_type)
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


def _total_norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    groups: dict[object, list[Tensor]] = {}
    for gradient in gradients:
        groups.setdefault(gradient.device_mesh if isinstance(gradient, DTensor) else None, []).append(gradient)
    norms = [_group_norm(group, norm_type) for group in groups.values()]
    if not norms:
        return torch.tensor(0.0)
    return norms[0] if len(norms) == 1 else torch.linalg.vector_norm(torch.stack(norms), norm_type)


def _group_norm(gradients: Sequence[Tensor], norm_type: float) -> Tensor:
    if math.isinf(norm_type) and isinstance(gradients[0], DTensor):
        return _largest(gradients, gradients[0].device_mesh)
    norm = get_total_norm(gradients, norm_type)
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _largest(gradients: Sequence[Tensor], mesh: DeviceMesh) -> Tensor:
    """Return the largest magnitude; an empty local shard counts as 0, since torch has no maximum of no elements."""
    parts = [part.abs().amax() for part in map(_local, gradients) if part.numel()]
    mine = torch.stack(parts).amax() if parts else torch.zeros((), device=_local(gradients[0]).device)
    return DTensor.from_local(mine, mesh, [Partial("max")] * mesh.ndim, run_check=False).full_tensor()


def _gradients(parameters: Sequence[Tensor]) -> list[Tensor]:
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient
