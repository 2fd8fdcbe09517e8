"""A replicated model whose layers other strategies have split: ``fully_shard`` with one shard per replica."""

from __future__ import annotations

from typing import Any

from torch.distributed.device_mesh import DeviceMesh

from plugframe_builtins._shared.fully_shard.strategy import FullyShardedStrategy
from plugframe_builtins._shared.sharding.mesh import averaged_axes


class Replicated(FullyShardedStrategy):
    """Average the gradients of parameters over the axis ``data``, whatever other axes they are split over.

    torch averages over the outer dimension of a mesh of two, and shards along the inner one, which has one rank here.
    Beside a strategy that divides the sequence, gradients are averaged over its axis too: the parameters are then
    sharded over ``data``.

    Args:
        name: the strategy's name, for messages.
    """

    axes = ("data", "shard")
    graph_remedy = "use that strategy alone"

    def __init__(self, name: str, **options: Any) -> None:
        self.name = name
        super().__init__(**options)

    def _own_mesh(self, mesh: DeviceMesh) -> DeviceMesh:
        averaged = averaged_axes(self.name, mesh, self.context)
        return mesh[averaged] if len(averaged) > 1 else mesh[(*averaged, "shard") if averaged else self.axes]
