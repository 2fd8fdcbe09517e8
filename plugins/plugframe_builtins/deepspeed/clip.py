"""Clip sharded gradients before DeepSpeed's step, which would otherwise do it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.errors import UnsupportedError

#: ``reduce(tensor, op)`` over all ranks.
Reduce = Callable[[Tensor, Any], Tensor]


@torch.no_grad()
def clip_by_value(gradients: Sequence[Tensor], limit: float, scale: float) -> None:
    """Clamp every element to ``[-limit, limit]``, in place, of gradients that are scaled by `scale`."""
    for gradient in gradients:
        gradient.clamp_(-limit * scale, limit * scale)


@torch.no_grad()
def clip_by_norm(
    gradients: Sequence[Tensor],
    max_norm: float,
    norm_type: float,
    *,
    scale: float,
    error_if_nonfinite: bool,
    reduce: Reduce | None,
    device: torch.device,
) -> Tensor:
    """Scale the gradients so that their total norm is at most `max_norm`; return the norm before, a 0-d tensor.

    Args:
        gradients: this rank's shards, scaled by `scale` and padded with zeros.
        reduce: over the ranks that hold the other shards; None if gradients are replicated.

    Raises:
        RuntimeError: if the norm is not finite and `error_if_nonfinite`.
        UnsupportedError: for a norm of order 0 or less.
    """
    if norm_type <= 0:  # such norms would count the zeros of the padding
        raise UnsupportedError(f"norm_type={norm_type:g} under strategy 'deepspeed': use a norm above 0, or inf.")
    norms = [torch.linalg.vector_norm(g, norm_type, dtype=_wide(g)).to(device) for g in gradients if g.numel()]
    own = torch.linalg.vector_norm(torch.stack(norms), norm_type) if norms else torch.zeros((), device=device)
    total = _over_ranks(own, norm_type, reduce) / scale
    if error_if_nonfinite and not bool(torch.isfinite(total)):
        raise RuntimeError(
            f"The total norm of order {norm_type:g} of the gradients is {total.item()}, so they cannot be clipped. To "
            "clip them nevertheless, pass error_if_nonfinite=False."
        )
    # As in torch.nn.utils.clip_grad_norm_: 1e-6 avoids a division by zero.
    factor = torch.clamp(max_norm / (total + 1e-6), max=1.0)
    for gradient in gradients:
        gradient.mul_(factor.to(gradient.device, gradient.dtype))
    return total


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.float64 if gradient.dtype is torch.float64 else torch.float32


def _over_ranks(own: Tensor, norm_type: float, reduce: Reduce | None) -> Tensor:
    if reduce is None:
        return own
    if norm_type == float("inf"):
        return reduce(own, "max")
    total: Tensor = reduce(own.pow(norm_type), "sum").pow(1.0 / norm_type)
    return total
