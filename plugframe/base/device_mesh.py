"""The device mesh of a job, on the process groups of its collective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plugframe.errors import UnsupportedError
from plugframe.hooks.context import Context


def make_device_mesh(context: Context, names: Sequence[str], sizes: Sequence[int]) -> Any:
    """Return a ``DeviceMesh`` of all ranks, whose ranks count along the last axis first. Every rank must call it.

    Torch makes the groups of the axes if the collective's process group is torch's default one. For any other they are
    those of `collective_new_group`.

    Args:
        names: of the axes, outermost first.
        sizes: of the axes, which multiply to the number of ranks.

    Raises:
        UnsupportedError: if the collective has no process group, or its new groups are none of torch.
    """
    group, collective = context.hooks.collective_process_group(), repr(context.names.get("collective"))
    if group is None:
        raise UnsupportedError(
            f"A device mesh needs a process group, and collective {collective} has none: use another collective, or "
            "leave mesh= and the further strategies out."
        )
    # Imported late: a job without a mesh does not need it.
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

    if group is dist.group.WORLD:
        return init_device_mesh(context.device.type, tuple(sizes), mesh_dim_names=tuple(names))
    ranks, own = torch.arange(context.world.world_size).view(*sizes), []
    for dim, size in enumerate(sizes):
        for row in ranks.movedim(dim, -1).reshape(-1, size).tolist():
            made = context.hooks.collective_new_group(ranks=row)
            if context.world.global_rank in row:
                own.append(made)
    odd = next((each for each in own if not isinstance(each, dist.ProcessGroup)), None)
    if odd is not None:
        raise UnsupportedError(
            f"A device mesh needs process groups of torch, and collective_new_group() of collective {collective} "
            f"returns a {type(odd).__name__}: use another collective, or leave mesh= and the further strategies out."
        )
    given = own[0] if len(own) == 1 else own
    mesh = None if len(own) == 1 else ranks
    return DeviceMesh.from_group(given, context.device.type, mesh=mesh, mesh_dim_names=tuple(names))
