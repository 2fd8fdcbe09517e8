"""Chunks of a sequence over the ranks of an axis, with their gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plugframe_builtins._shared.torch_collective.gradients import linear


@dataclass(frozen=True, eq=False)
class SequenceAxis:
    """The ranks over which a sequence is divided; rank i has the i-th chunk.

    Gradients within the blocks are `size` times this rank's part of the gradient, outside of them the complete
    gradient on every rank. So their average over the axis is the gradient of one process for every parameter.

    Attributes:
        hooks: hooks of the job.
        group: the process group of the axis.
        index: of this rank in it.
        size: number of ranks.
        device: of this rank.
    """

    hooks: Any
    group: Any
    index: int
    size: int
    device: torch.device

    def split(self, tensor: Tensor, dim: int) -> Tensor:
        """Return this rank's chunk along `dim`. The gradient is gathered and divided by the size of the axis."""

        def chunk(whole: Tensor) -> Tensor:
            # A copy, which a block can change in place.
            return whole.chunk(self.size, dim)[self.index].clone(memory_format=torch.contiguous_format)

        def join(part: Tensor) -> Tensor:
            return self.gather(part, dim) / self.size

        return linear(tensor, chunk, join) if tensor.requires_grad else chunk(tensor)

    def enter(self, tensor: Tensor) -> Tensor:
        """Return a tensor that every rank uses for its own tokens. The gradient is averaged over the axis."""

        def average(gradient: Tensor) -> Tensor:
            mean: Tensor = self.hooks.collective_all_reduce(tensor=gradient.contiguous(), op="mean", group=self.group)
            return mean

        return linear(tensor, Tensor.detach, average) if tensor.requires_grad else tensor

    def gather(self, tensor: Tensor, dim: int) -> Tensor:
        """Return the chunks of all ranks, joined along `dim`. The gradient is the sum over the ranks."""
        rows = self.hooks.collective_all_gather(tensor=tensor.contiguous(), group=self.group, sync_grads=True)
        return torch.cat(rows.unbind(0), dim)

    def to_heads(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return tensors of shape (…, H, S/n, D) as (…, H/n, S, D): all tokens of this rank's heads."""
        if len({(each.shape[:-3], each.shape[-1], each.dtype) for each in tensors}) > 1:
            return [self.to_heads([each])[0] for each in tensors]
        apart = [_rows(each, -3, self.size) for each in tensors]
        sent = apart[0] if len(apart) == 1 else torch.cat(apart, -3)
        joined = self._exchange(sent).movedim(0, -3).flatten(-3, -2)
        return list(torch.split(joined, [each.shape[-3] // self.size for each in tensors], -3))

    def to_tokens(self, tensor: Tensor) -> Tensor:
        """Return a tensor of shape (…, H/n, S, D) as (…, H, S/n, D): all heads of this rank's tokens."""
        return self._exchange(_rows(tensor, -2, self.size)).movedim(0, -4).flatten(-4, -3)

    def _exchange(self, tensor: Tensor) -> Tensor:
        found: Tensor = self.hooks.collective_all_to_all(
            tensor=tensor.contiguous(), output_sizes=None, input_sizes=None, group=self.group, sync_grads=True
        )
        return found


def _rows(tensor: Tensor, dim: int, number: int) -> Tensor:
    """Return `number` chunks along `dim`, from the right, stacked."""
    return torch.stack(tensor.chunk(number, dim))
