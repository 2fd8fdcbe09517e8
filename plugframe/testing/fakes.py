"""Fakes for tests: an accelerator with several devices, and a node of a cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from plugframe.base import Accelerator, parse_devices
from plugframe.hooks import hookimpl

NUM_DEVICES = 4


class FakeAccelerator(Accelerator):
    """Devices that are counted and chosen by index like real ones, and compute on the CPU.

    Args:
        num_devices: how many there are.
    """

    device_type = "cpu"
    indexed = False

    def __init__(self, *, num_devices: int = NUM_DEVICES) -> None:
        self.num_devices = num_devices

    @hookimpl
    def accelerator_is_available(self) -> bool:
        return True

    @hookimpl
    def accelerator_device_count(self) -> int:
        return self.num_devices

    @hookimpl
    def accelerator_parse_devices(self, devices: int | str | Sequence[int]) -> tuple[int, ...]:
        return parse_devices(devices, count=self.num_devices, name="fake")

    @hookimpl
    def accelerator_collective_backend(self) -> str:
        return "gloo"

    @hookimpl
    def accelerator_move_batch(self, batch: Any, device: torch.device) -> Any:
        return batch


def cluster_variables(
    *, num_nodes: int = 1, ranks_per_node: int = 1, rank: int = 0, port: int = 29500, started_by: str = "torchrun"
) -> dict[str, str]:
    """Return the variables that `started_by` sets for one rank; ranks are numbered node after node.

    Args:
        started_by: ``"torchrun"``, ``"srun"`` or ``"mpirun"``.
    """
    starters = {"torchrun": _torchrun, "srun": _srun, "mpirun": _mpirun}
    if started_by not in starters:
        raise ValueError(f"started_by={started_by!r} is not one of {', '.join(starters)}.")
    if not 0 <= rank < num_nodes * ranks_per_node:
        raise ValueError(f"rank={rank} is not one of {num_nodes} nodes with {ranks_per_node} ranks each.")
    values = starters[started_by](num_nodes, ranks_per_node, rank)
    address = "127.0.0.1" if num_nodes == 1 else "node0"
    return {name: str(value) for name, value in {**values, "MASTER_ADDR": address, "MASTER_PORT": port}.items()}


def _torchrun(num_nodes: int, ranks_per_node: int, rank: int) -> dict[str, Any]:
    node, local = divmod(rank, ranks_per_node)
    size = num_nodes * ranks_per_node
    return {
        **{"RANK": rank, "ROLE_RANK": rank, "LOCAL_RANK": local, "GROUP_RANK": node, "ROLE_NAME": "default"},
        **{"WORLD_SIZE": size, "ROLE_WORLD_SIZE": size, "LOCAL_WORLD_SIZE": ranks_per_node},
        **{"GROUP_WORLD_SIZE": num_nodes, "TORCHELASTIC_RUN_ID": "fake"},
        **{"TORCHELASTIC_RESTART_COUNT": 0, "TORCHELASTIC_MAX_RESTARTS": 0},
    }


def _srun(num_nodes: int, ranks_per_node: int, rank: int) -> dict[str, Any]:
    node, local = divmod(rank, ranks_per_node)
    size = num_nodes * ranks_per_node
    tasks = f"{ranks_per_node}(x{num_nodes})" if num_nodes > 1 else ranks_per_node
    hosts = f"node[0-{num_nodes - 1}]" if num_nodes > 1 else "node0"
    return {
        **{"SLURM_JOB_ID": 4711, "SLURM_STEP_ID": 0, "SLURM_NTASKS": size, "SLURM_STEP_NUM_TASKS": size},
        **{"SLURM_NNODES": num_nodes, "SLURM_STEP_NUM_NODES": num_nodes},
        **{"SLURM_TASKS_PER_NODE": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks},
        **{"SLURM_JOB_NODELIST": hosts, "SLURM_STEP_NODELIST": hosts},
        **{"SLURM_PROCID": rank, "SLURM_LOCALID": local, "SLURM_NODEID": node},
    }


def _mpirun(num_nodes: int, ranks_per_node: int, rank: int) -> dict[str, Any]:
    return {
        **{"OMPI_COMM_WORLD_RANK": rank, "OMPI_COMM_WORLD_LOCAL_RANK": rank % ranks_per_node},
        **{"OMPI_COMM_WORLD_SIZE": num_nodes * ranks_per_node, "OMPI_COMM_WORLD_LOCAL_SIZE": ranks_per_node},
    }
