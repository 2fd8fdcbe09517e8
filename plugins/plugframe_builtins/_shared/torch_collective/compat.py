"""What differs between versions of torch, and what torch keeps for too long."""

from __future__ import annotations

import importlib
import sys

import torch.distributed as dist

# torch 2.13 renamed them: the old ones warn there, the new ones are missing before.
if hasattr(dist, "all_gather_single"):
    all_gather_single = dist.all_gather_single
    reduce_scatter_single = dist.reduce_scatter_single
else:
    all_gather_single = dist.all_gather_into_tensor
    reduce_scatter_single = dist.reduce_scatter_tensor

__all__ = ["all_gather_single", "forget_meshes", "reduce_scatter_single"]


def forget_meshes() -> None:
    """Clear the caches in which torch keeps meshes of DTensors after their process groups are destroyed.

    torch looks results of operations up by equal meshes, and finds those of an earlier job here, whose process groups
    have other names: "Could not resolve the process group registered under the name" (torch 2.13).
    """
    debug = sys.modules.get("torch.distributed.tensor.debug")
    if debug is None and "torch.distributed.tensor" in sys.modules:
        debug = importlib.import_module("torch.distributed.tensor.debug")
    clear = getattr(debug, "_clear_sharding_prop_cache", None)  # not public
    if clear is not None:
        clear()
