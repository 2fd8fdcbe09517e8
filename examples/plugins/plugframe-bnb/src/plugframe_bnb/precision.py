"""The precision: linear layers become frozen ones in 4 bits, with adapters."""

from __future__ import annotations

from collections.abc import Sequence

import bitsandbytes as bnb
import torch
from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit
from torch import Tensor, nn
from torch.nn import functional

from plugframe.base import Precision
from plugframe.errors import UnsupportedError
from plugframe.hooks import hookimpl

#: Weights that share a scale.
BLOCK = 64


class NF4Linear(nn.Module):
    """A frozen linear layer in 4 bits, plus a low-rank adapter: ``x @ W.T + bias + scale * up(down(x))``.

    The packed weights and their scales are buffers, so that checkpoints, copies and strategies hold them as any tensor.
    """

    packed: Tensor
    absmax: Tensor

    def __init__(self, linear: nn.Linear, *, rank: int, scale: float) -> None:
        super().__init__()
        packed, state = quantize_4bit(linear.weight.data, blocksize=BLOCK, quant_type="nf4")
        self.register_buffer("packed", packed)
        self.register_buffer("absmax", state.absmax)
        self.shape, self.dtype, self.scale = linear.weight.shape, linear.weight.dtype, scale
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.data, requires_grad=False)
        made = {"dtype": linear.weight.dtype, "device": linear.weight.device}
        self.down = nn.Parameter(torch.empty(rank, linear.in_features, **made))
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank, **made))  # starts as the frozen layer
        nn.init.kaiming_uniform_(self.down, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for x, of shape (..., inputs)."""
        code = get_4bit_type("nf4", device=x.device)
        state = QuantState(
            absmax=self.absmax, shape=self.shape, code=code, blocksize=BLOCK, quant_type="nf4", dtype=self.dtype
        )
        frozen: Tensor = bnb.matmul_4bit(x, self.packed.t(), quant_state=state, bias=self.bias)
        return frozen + self.scale * functional.linear(functional.linear(x, self.down), self.up)


class NF4(Precision):
    """Keep linear layers frozen in 4 bits (nf4) and train a low-rank adapter of each; other parameters are frozen.

    Args:
        rank: rank of the adapters.
        alpha: scale of the adapters, divided by their rank.
        skip: words; a linear layer whose name contains one stays as it is, and trains.
    """

    def __init__(self, *, rank: int = 8, alpha: float = 16.0, skip: Sequence[str] = ()) -> None:
        self.rank, self.alpha, self.skip = rank, alpha, tuple(skip)

    @hookimpl
    def precision_convert_module(self, module: nn.Module) -> nn.Module:
        linears = {name: part for name, part in module.named_modules() if type(part) is nn.Linear and name}
        kept = {name for name in linears if any(word in name for word in self.skip)}
        if len(linears) == len(kept):
            raise UnsupportedError(
                f"precision={self.context.names['precision']!r} finds no linear layer inside {type(module).__name__} "
                f"to convert; skip={list(self.skip)} leaves out {len(kept)}."
            )
        for name, parameter in module.named_parameters():
            # Weights that are replaced stay as they are: an optimizer that holds them is found by that they trained.
            if name.rpartition(".")[0] not in linears:
                parameter.requires_grad_(False)
        for name, linear in linears.items():
            if name not in kept:
                parent, _, last = name.rpartition(".")
                new = NF4Linear(linear, rank=self.rank, scale=self.alpha / self.rank)
                setattr(module.get_submodule(parent), last, new)
        return module
