"""Where this process stands among the processes of the job."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class World:
    """The ranks of one job, seen from this process.

    Attributes:
        global_rank: 0 … world_size - 1.
        local_rank: 0 … local_world_size - 1, on this node.
        node_rank: 0 … num_nodes - 1.
        world_size: number of ranks of the job.
        local_world_size: number of ranks on this node.
        num_nodes: number of nodes.
    """

    global_rank: int = 0
    local_rank: int = 0
    node_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    num_nodes: int = 1
