"""Reductions with correct results in every dtype: the wire dtype, and the conversion back."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from plugframe.base.collective import check_reduction

_OPS = {
    "sum": dist.ReduceOp.SUM,
    "mean": dist.ReduceOp.SUM,
    "avg": dist.ReduceOp.SUM,
    "min": dist.ReduceOp.MIN,
    "max": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
}
# A bool travels as a byte, and 1 + 1 is not a bool.
_BOOL_OPS = {**_OPS, "sum": dist.ReduceOp.MAX, "product": dist.ReduceOp.MIN}


class Reduction:
    """One reduction of one tensor: `send`, reduce over the ranks with `op`, then `receive` the result.

    Attributes:
        send: the tensor to reduce: flat, contiguous, not shared.
        op: torch's reduction operation.
    """

    def __init__(self, op: str, tensor: Tensor) -> None:
        check_reduction(op, tensor)
        self._mean = op in ("mean", "avg")
        self._dtype = tensor.dtype
        self.op = (_BOOL_OPS if tensor.dtype is torch.bool else _OPS)[op]
        dtype = self._wire_dtype(tensor)
        work = tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)
        work = work.resolve_conj().resolve_neg()
        self.send = (torch.view_as_real(work) if work.is_complex() else work).reshape(-1)

    def _wire_dtype(self, tensor: Tensor) -> torch.dtype:
        if tensor.dtype is torch.bool:
            return torch.uint8
        # The sum of float16 overflows or rounds where the mean does not; gloo cannot add float8.
        if tensor.is_floating_point() and tensor.element_size() < (4 if self._mean else 2):
            return torch.float32
        return tensor.dtype

    def combine(self, rows: Tensor) -> Tensor:
        """Reduce the ranks' bytes locally, dtype uint8 and shape (ranks, n); the result is equal on all ranks."""
        values = rows.view(self.send.dtype)
        if self.op == dist.ReduceOp.SUM:
            return values.sum(0, dtype=values.dtype)
        if self.op == dist.ReduceOp.PRODUCT:
            return values.prod(0, dtype=values.dtype)
        return values.amax(0) if self.op == dist.ReduceOp.MAX else values.amin(0)

    def receive(self, reduced: Tensor, *, shape: torch.Size, size: int) -> Tensor:
        """Return the result of the given shape, in the input's dtype, from the flat `reduced` of `size` ranks."""
        if self._mean:
            reduced.div_(size)
        if self._dtype.is_complex:
            reduced = torch.view_as_complex(reduced.view(-1, 2))
        return reduced.to(self._dtype).view(shape)
