"""Names that torch 2.13 renamed: the old ones warn there, the new ones are missing before."""

from __future__ import annotations

import torch.distributed as dist

if hasattr(dist, "all_gather_single"):
    all_gather_single = dist.all_gather_single
    reduce_scatter_single = dist.reduce_scatter_single
else:
    all_gather_single = dist.all_gather_into_tensor
    reduce_scatter_single = dist.reduce_scatter_tensor

__all__ = ["all_gather_single", "reduce_scatter_single"]
