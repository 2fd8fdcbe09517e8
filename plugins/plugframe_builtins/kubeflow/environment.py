"""The environment of PyTorchJob pods."""

from __future__ import annotations

import os

from plugframe.base import Environment
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World
from plugframe_builtins.kubeflow import plugin


class Kubeflow(Environment):
    """One process in each pod of a PyTorchJob. For several in a pod use torchrun."""

    name = "Kubeflow"
    processes_hint = "torchrun --nproc-per-node={n}"

    @hookimpl
    def environment_detect(self) -> bool:
        return all(v in os.environ for v in plugin.variables) and "LOCAL_RANK" not in os.environ

    @hookimpl
    def environment_world(self) -> World:
        processes = os.environ.get("PET_NPROC_PER_NODE", "1")
        if processes.isdigit() and int(processes) > 1:
            raise EnvironmentMismatchError(
                f"PET_NPROC_PER_NODE={processes}, and this is the only process of its pod: make 'torchrun train.py' "
                "the command of the container, or remove nprocPerNode from the PyTorchJob."
            )
        rank, size = self.read_int("RANK"), self.read_int("WORLD_SIZE")
        world = World(global_rank=rank, node_rank=rank, world_size=size, num_nodes=size)
        return self.checked(
            world,
            {
                "global_rank": "RANK",
                "node_rank": "RANK",
                "world_size": "WORLD_SIZE",
                "num_nodes": "WORLD_SIZE",
            },
        )

    def main(self) -> tuple[str, int]:
        return os.environ.get("MASTER_ADDR", ""), self.read_int("MASTER_PORT")
