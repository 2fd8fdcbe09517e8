"""Average sparse gradients (``nn.Embedding(sparse=True)``) over ranks."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_NONE, _SPARSE, _DENSE = 0, 1, 2


def sparse_parameters(module: nn.Module) -> set[int]:
    """Return the ids of parameters whose gradients are sparse."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return {id(part.weight) for part in module.modules() if isinstance(part, kinds) and part.sparse}


@torch.no_grad()
def average_sparse(parameter: nn.Parameter, group: Any) -> None:
    """Average the gradient of `parameter` over the ranks of `group`. All of them must call it.

    The result is sparse, or None if no rank has a gradient; it is dense if that of any rank is.
    """
    gradient = parameter.grad
    kind = _NONE if gradient is None else _DENSE if gradient.layout is torch.strided else _SPARSE
    if kind == _SPARSE:
        assert gradient is not None
        gradient = gradient.coalesce()
    size = dist.get_world_size(group)
    mine = torch.tensor([kind, gradient._nnz() if kind == _SPARSE else 0], device=parameter.device)  # type: ignore[union-attr]
    rows = [torch.empty_like(mine) for _ in range(size)]
    dist.all_gather(rows, mine, group=group)
    kinds, counts = zip(*(row.tolist() for row in rows), strict=True)
    if max(kinds) == _NONE:
        return
    if max(kinds) == _DENSE:
        dense = torch.zeros_like(parameter) if gradient is None else gradient.to_dense()
        dense = dense.div_(size).contiguous()
        dist.all_reduce(dense, group=group)
        parameter.grad = dense
        return
    parameter.grad = _gathered(gradient, parameter, counts, group)


def _gathered(gradient: Tensor | None, parameter: Tensor, counts: tuple[int, ...], group: Any) -> Tensor:
    most, size = max(counts), len(counts)
    # An embedding's gradient is sparse in rows only.
    indices = torch.zeros(most, dtype=torch.int64, device=parameter.device)
    values = parameter.new_zeros(most, *parameter.shape[1:])
    if gradient is not None:
        indices[: gradient._nnz()] = gradient.indices()[0]
        values[: gradient._nnz()] = gradient.values() / size
    all_indices = [torch.empty_like(indices) for _ in range(size)]
    all_values = [torch.empty_like(values) for _ in range(size)]
    if most:
        dist.all_gather(all_indices, indices, group=group)
        dist.all_gather(all_values, values, group=group)
    pairs = zip(all_indices, all_values, counts, strict=True)
    kept = [(index[:count], value[:count]) for index, value, count in pairs]
    rows = torch.cat([index for index, _ in kept]).unsqueeze(0)
    # Explicit, since torch warns about the default (torch 2.13).
    return torch.sparse_coo_tensor(
        rows, torch.cat([value for _, value in kept]), parameter.shape, check_invariants=False
    ).coalesce()
