"""A linear layer on 8-bit numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: Four bits of exponent and three of mantissa, or five and two.
FORMATS = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


def quantize(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `tensor` in fp8, and what to multiply it with: a float32 scale that makes its greatest number fit.

    A number that is not finite makes the scale so, and with it every result.
    """
    most = torch.finfo(dtype).max
    greatest = tensor.detach().abs().amax().float() if tensor.numel() else torch.ones((), device=tensor.device)
    scale = torch.where(greatest == 0, torch.ones_like(greatest), greatest / most)
    # Of the least numbers float32 has, that quotient is none any more.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor / scale).clamp(-most, most).to(dtype), scale


class Fp8Linear(torch.autograd.Function):
    """``input @ weight.T`` in fp8; its gradients too. What it keeps for backward takes a byte a number."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, gradients: torch.dtype) -> Tensor:
        ctx.gradients = gradients
        ctx.dtypes = input.dtype, weight.dtype
        x, x_scale = quantize(input, torch.float8_e4m3fn)
        w, w_scale = quantize(weight, torch.float8_e4m3fn)
        ctx.save_for_backward(x, x_scale, w, w_scale)
        return _product(x, w.t(), x_scale * w_scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, x_scale, w, w_scale = ctx.saved_tensors
        g, g_scale = quantize(grads[0], ctx.gradients)
        of_input = of_weight = None
        if ctx.needs_input_grad[0]:
            of_input = _product(g, w, g_scale * w_scale).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            of_weight = _product(rows.t(), columns, g_scale * x_scale, torch.float32).to(ctx.dtypes[1])
        return of_input, of_weight, None


def _product(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # Every number of both formats is one of bfloat16 too, so that nothing is lost on the way in.
    with torch.autocast(a.device.type, enabled=False):
        return (torch.matmul(a.to(dtype), b.to(dtype)).float() * scale).to(dtype)
