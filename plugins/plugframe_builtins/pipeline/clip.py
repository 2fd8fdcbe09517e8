"""Clip gradients that lie on the ranks of several stages."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from plugframe.errors import SettingError
from plugframe_builtins.pipeline.axis import Axis


def clip_by_norm(
    parameters: Sequence[Tensor],
    staged: Collection[int],
    axis: Axis,
    max_norm: float,
    norm_type: float,
    error_if_nonfinite: bool,
) -> Tensor:
    """Scale the gradients so that their norm over all stages is at most `max_norm`; return the norm before.

    Every rank must call it.

    Args:
        parameters: this rank's, with gradients.
        staged: ids of the parameters that only this rank has; others are on every rank and count once.

    Raises:
        SettingError: for an order that is not above 0.
        RuntimeError: if the norm is not finite and `error_if_nonfinite`, on all ranks.
    """
    if not norm_type > 0:
        raise SettingError(f"norm_type={norm_type:g}: the norm of shards is defined for orders above 0, inf included.")
    gradients = [p.grad for p in parameters if p.grad is not None]
    counted = [p.grad for p in parameters if p.grad is not None and (id(p) in staged or axis.rank == 0)]
    norm = get_total_norm(counted, norm_type) if counted else torch.zeros(())
    largest = math.isinf(norm_type)
    # Ranks may have gradients of different dtypes.
    own = norm.to(axis.device, torch.float32 if axis.device.type == "mps" else torch.float64)
    share = own if largest else own**norm_type
    total: Tensor = axis.hooks.collective_all_reduce(tensor=share, op="max" if largest else "sum", group=axis.group)
    if not largest:
        total = total ** (1.0 / norm_type)
    total = total.to(norm.dtype)
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type:g} of the gradients is non-finite ({total.item()}), so they cannot be "
            "clipped. To clip them nevertheless, pass error_if_nonfinite=False."
        )
    # As in torch.nn.utils.clip_grad_norm_: 1e-6 avoids a division by zero.
    scale = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(scale.to(gradient.device, gradient.dtype))
    return total
