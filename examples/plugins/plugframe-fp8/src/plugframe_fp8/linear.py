"""A linear layer in fp8."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

#: e5m2: 5 exponent and 2 mantissa bits; e4m3: 4 and 3.
FORMATS = {"e5m2": torch.float8_e5m2, "e4m3": torch.float8_e4m3fn}


def quantize(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return `tensor` in fp8 and its float32 scale, which maps the largest magnitude to the maximum of the format.

    A non-finite element makes the scale, and thus every result, non-finite.
    """
    max_value = torch.finfo(dtype).max
    amax = tensor.detach().abs().amax().float() if tensor.numel() else torch.ones((), device=tensor.device)
    scale = torch.where(amax == 0, torch.ones_like(amax), amax / max_value)
    # The quotient of the smallest float32 numbers underflows.
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (tensor / scale).clamp(-max_value, max_value).to(dtype), scale


class Fp8Linear(torch.autograd.Function):
    """``input @ weight.T`` in fp8, gradients included. Tensors are saved for backward in fp8."""

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
        grad_input = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_input = _product(g, w, g_scale * w_scale).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            rows, columns = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
            grad_weight = _product(rows.t(), columns, g_scale * x_scale, torch.float32).to(ctx.dtypes[1])
        return grad_input, grad_weight, None


def _product(a: Tensor, b: Tensor, scale: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    # bfloat16 represents all numbers of both formats exactly.
    with torch.autocast(a.device.type, enabled=False):
        return (torch.matmul(a.to(dtype), b.to(dtype)).float() * scale).to(dtype)
