"""The ranks over which experts are divided, and what they exchange."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from plugframe_builtins._shared.torch_collective.gradients import linear


@dataclass(frozen=True, eq=False)
class ExpertAxis:
    """The axis ``expert`` of a mesh whose axes are averaged over together.

    Ranks are counted by their position in that mesh. Those of other axes, which do not average, do the same beside it.

    Attributes:
        hooks: hooks of the job.
        mesh: of the ranks over which gradients are averaged.
        group: of all ranks of the mesh, None for those of the job.
        name: of the axis.
        device: of this rank.
        dtype: in which parameters are sent, None for their own.
        copies: groups of the ranks that run the same experts on the same tokens.
    """

    hooks: Any
    mesh: DeviceMesh
    group: Any
    name: str
    device: torch.device
    dtype: torch.dtype | None
    copies: Sequence[Any] = ()

    @cached_property
    def dim(self) -> int:
        """The dimension of the mesh."""
        return (self.mesh.mesh_dim_names or ()).index(self.name)

    @cached_property
    def rank(self) -> int:
        """This rank's position."""
        return self.mesh.mesh.flatten().tolist().index(self.mesh.get_rank())

    @property
    def size(self) -> int:
        """The number of ranks over which the experts are divided."""
        return self.mesh.size(self.dim)

    @cached_property
    def index(self) -> int:
        """This rank's index along the axis."""
        return self.mesh.get_local_rank(self.dim)

    @property
    def num_ranks(self) -> int:
        """The number of ranks of the mesh."""
        return self.mesh.size()

    @cached_property
    def column(self) -> list[int]:
        """The ranks along the axis, this one among them."""
        mine = self._coordinates[self.rank]
        others = (self._coordinates[rank] for rank in range(self.num_ranks))
        same = [
            [*each[: self.dim], *each[self.dim + 1 :]] == [*mine[: self.dim], *mine[self.dim + 1 :]] for each in others
        ]
        return [rank for rank in range(self.num_ranks) if same[rank]]

    def index_of(self, rank: int) -> int:
        """Return a rank's index along the axis."""
        return self._coordinates[rank][self.dim]

    @cached_property
    def _coordinates(self) -> list[list[int]]:
        return [list(place) for place in itertools.product(*map(range, self.mesh.shape))]

    def shard(self, parameter: Tensor, placements: Sequence[Placement]) -> DTensor:
        """Return this rank's shard of a tensor that all ranks have."""
        full = parameter.detach() if parameter.is_meta else parameter.detach().to(self.device)
        made = distribute_tensor(full, self.mesh, placements, src_data_rank=None)
        local = made.to_local()
        if local.untyped_storage().nbytes() == local.nbytes:
            return made
        return DTensor.from_local(
            local.clone(), self.mesh, placements, run_check=False, shape=made.shape, stride=made.stride()
        )

    def shape_on(self, rank: int, tensor: DTensor) -> list[int]:
        """Return the shape of a rank's shard; dimensions of the mesh shard one after another, as ``chunk`` does."""
        shape = list(tensor.shape)
        for placement, size, index in zip(tensor.placements, self.mesh.shape, self._coordinates[rank], strict=True):
            assert isinstance(placement, Shard)
            length = shape[placement.dim]
            chunk = -(-length // size)
            shape[placement.dim] = max(0, min(length, (index + 1) * chunk) - index * chunk)
        return shape

    def exchange(self, tensor: Tensor, received: Sequence[int], sent: Sequence[int]) -> Tensor:
        """Send rows to the ranks along the axis, and return those received; gradients go back."""
        group = self.mesh.get_group(self.dim)

        def send(rows: Tensor) -> Tensor:
            return self.all_to_all(rows, received, sent, group)

        def back(gradients: Tensor) -> Tensor:
            return self.all_to_all(gradients, sent, received, group)

        return linear(tensor, send, back)

    def all_to_all(self, tensor: Tensor, received: Sequence[int], sent: Sequence[int], group: Any) -> Tensor:
        """Send rows to the ranks of a group, and return those received, without gradients."""
        found: Tensor = self.hooks.collective_all_to_all(
            tensor=tensor.detach().contiguous(),
            output_sizes=list(received),
            input_sizes=list(sent),
            group=group,
            sync_grads=False,
        )
        return found


def tie(tensor: Tensor, other: Tensor) -> Tensor:
    """Return `tensor`, whose backward reaches `other` too, without a gradient.

    Every rank then runs the collectives in the backward of `other`, whether it uses its values or not.
    """
    if not (torch.is_grad_enabled() and other.requires_grad and tensor.is_floating_point()):
        return tensor
    tied: Tensor = _Tie.apply(tensor, other)  # type: ignore[no-untyped-call]
    return tied


class _Tie(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, other: Tensor) -> Tensor:
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None
