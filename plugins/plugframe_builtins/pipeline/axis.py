"""The ranks of one pipeline, and how they reach each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from plugframe.base import make_device_mesh
from plugframe.hooks.context import Context

#: The name of the axis in a mesh.
NAME = "pipeline"


@dataclass(frozen=True, eq=False)
class Axis:
    """The pipeline axis of the mesh, seen from this rank.

    Attributes:
        group: the process group of the pipeline; its ranks are in the order of the stages.
        ranks: global ranks of the group.
        rank: position of this rank in it.
        device: this rank's device.
        hooks: the hooks of the job, for collectives.
        data_shard: ``(index, count)`` of the data that this pipeline reads; other pipelines read the others.
        replicas: for each rank of the pipeline the global ranks that hold the same stages, itself included.
        simulated: whether the other ranks do not exist.
    """

    group: Any
    ranks: tuple[int, ...]
    rank: int
    device: torch.device
    hooks: Any
    data_shard: tuple[int, int] = (0, 1)
    replicas: tuple[tuple[int, ...], ...] = ()
    simulated: bool = False

    @property
    def size(self) -> int:
        """Number of ranks of the pipeline."""
        return len(self.ranks)

    def broadcast(self, tensor: torch.Tensor, src: int) -> torch.Tensor:
        """Return the tensor of the rank at position `src`; every rank of the pipeline must call it."""
        sent = tensor.contiguous()
        result: torch.Tensor = self.hooks.collective_broadcast(tensor=sent, src=self.ranks[src], group=self.group)
        return result

    def broadcast_object(self, obj: Any, src: int) -> Any:
        """Return the object of the rank at position `src`; every rank of the pipeline must call it."""
        return self.hooks.collective_broadcast_object(obj=obj, src=self.ranks[src], group=self.group)

    def gather_objects(self, obj: Any) -> list[Any]:
        """Return the objects of all ranks of the pipeline."""
        everyone: list[Any] = self.hooks.collective_all_gather_object(obj=obj, group=self.group)
        return everyone


def make_axis(context: Context, mesh: DeviceMesh, name: str, data_shard: tuple[int, int] = (0, 1)) -> Axis:
    """Return the axis `name` of a mesh of all ranks, seen from this rank. Called on every rank.

    Ranks along the other axes hold the same stages: what averages their gradients is not the pipeline's affair.

    Args:
        data_shard: index and count of the data shards along the other axes.
    """
    group = mesh.get_group(name)
    names = mesh.mesh_dim_names or (name,)
    rows = mesh.mesh.movedim(names.index(name), 0).reshape(mesh.size(names.index(name)), -1)
    return Axis(
        group=group,
        ranks=tuple(dist.get_process_group_ranks(group)),
        rank=dist.get_rank(group),
        device=context.device,
        hooks=context.hooks,
        data_shard=data_shard,
        replicas=tuple(tuple(row) for row in rows.tolist()),
        simulated="simulated" in context.provides.get("collective", ()),
    )


def whole_world(context: Context) -> Axis:
    """Return the axis of one pipeline over all ranks of the job."""
    mesh = make_device_mesh(context, (NAME,), (context.world.world_size,))
    return make_axis(context, mesh, NAME)
