"""Device meshes from a dict: ``{"replicate": 2, "shard": 4}``."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from plugframe.base import make_device_mesh
from plugframe.errors import SettingError, UnsupportedError
from plugframe.hooks.context import Context


def check_mesh(strategy: str, mesh: Mapping[str, int] | None, axes: tuple[str, ...]) -> None:
    """Validate the sizes, before the number of ranks is known.

    Raises:
        SettingError: with the accepted values.
    """
    if mesh is None:
        return
    example = ", ".join(f'"{axis}": 2' for axis in axes)
    if not isinstance(mesh, Mapping) or not mesh or any(axis not in axes for axis in mesh):
        raise SettingError(f"mesh={mesh!r} of strategy {strategy!r}: write a dict such as {{{example}}}.")
    for axis, size in mesh.items():
        if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
            raise SettingError(f"mesh={dict(mesh)!r} of strategy {strategy!r}: {axis!r} is a number of ranks, or -1.")
    if list(mesh.values()).count(-1) > 1:
        raise SettingError(f"mesh={dict(mesh)!r} of strategy {strategy!r}: only one axis can be -1, all that is left.")


def make_mesh(strategy: str, mesh: Mapping[str, int], axes: tuple[str, ...], context: Context) -> DeviceMesh:
    """Return the mesh of all ranks, with the named axes in order; an omitted axis has size 1.

    Called on every rank.

    Raises:
        SettingError: if the sizes do not multiply to the number of ranks.
    """
    ranks = context.world.world_size
    sizes = [mesh.get(axis, 1) for axis in axes]
    known = math.prod(size for size in sizes if size != -1)
    sizes = [ranks // known if size == -1 and ranks % known == 0 else size for size in sizes]
    if -1 in sizes or math.prod(sizes) != ranks:
        raise SettingError(
            f"mesh={dict(mesh)!r} of strategy {strategy!r} does not fit this job's {ranks} ranks: the sizes must "
            "multiply to that; -1 stands for all that is left."
        )
    mesh_of_ranks: DeviceMesh = make_device_mesh(context, axes, sizes)
    return mesh_of_ranks


def averaged_axes(strategy: str, mesh: DeviceMesh, context: Context) -> tuple[str, ...]:
    """Return those axes over which gradients are averaged that have several ranks, outermost first.

    Raises:
        UnsupportedError: if there are more than two.
    """
    sizes = dict(zip(mesh.mesh_dim_names or (), mesh.mesh.shape, strict=True))
    found = tuple(axis for axis in context.averaged if sizes[axis] > 1)
    if len(found) > 2:
        raise UnsupportedError(
            f"strategy {strategy!r} averages gradients over two axes at most, and {', '.join(found[:-1])} and "
            f"{found[-1]} of mesh= have several ranks: give {found[1]!r} one rank, and {found[-1]!r} its ranks."
        )
    return found


def group_of_axes(mesh: DeviceMesh, axes: Sequence[str], context: Context) -> Any:
    """Return the process group of the ranks that differ from this one along some axes of the mesh of all ranks.

    Every rank must call it. None for all ranks of the job.
    """
    names = mesh.mesh_dim_names or ()
    dims = [names.index(axis) for axis in axes]
    others = [dim for dim in range(mesh.ndim) if dim not in dims]
    rows = mesh.mesh.permute(*others, *dims).reshape(-1, math.prod(mesh.size(dim) for dim in dims)).tolist()
    if len(rows) == 1:
        return None
    if len(axes) == 1:
        return mesh.get_group(axes[0])
    groups = [(row, context.hooks.collective_new_group(ranks=row)) for row in rows]
    return next(group for row, group in groups if context.world.global_rank in row)
