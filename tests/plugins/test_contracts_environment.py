"""Every built-in environment passes the suite that third parties subclass (law 3), in jobs of its scheduler."""

from __future__ import annotations

from typing import Any

from contract_classes import of_builtins
from plugframe.testing.contracts.environment import EnvironmentContract


def nothing(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """A bare shell."""
    return {}


def torchrun(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What torchrun sets."""
    node, local = divmod(rank, ranks_per_node)
    return {
        "RANK": f"{rank}",
        "WORLD_SIZE": f"{num_nodes * ranks_per_node}",
        "LOCAL_RANK": f"{local}",
        "LOCAL_WORLD_SIZE": f"{ranks_per_node}",
        "GROUP_RANK": f"{node}",
        "GROUP_WORLD_SIZE": f"{num_nodes}",
        "MASTER_ADDR": "127.0.0.1" if num_nodes == 1 else "node0",
        "MASTER_PORT": f"{port}",
    }


def srun(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What srun sets, in a batch job of as many tasks."""
    node, local = divmod(rank, ranks_per_node)
    tasks = f"{ranks_per_node}(x{num_nodes})" if num_nodes > 1 else f"{ranks_per_node}"
    hosts = f"n[1-{num_nodes}]" if num_nodes > 1 else "n1"
    size = f"{num_nodes * ranks_per_node}"
    return {
        **{"SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_NTASKS": size, "SLURM_STEP_NUM_TASKS": size},
        **{"SLURM_NNODES": f"{num_nodes}", "SLURM_STEP_NUM_NODES": f"{num_nodes}", "MASTER_PORT": f"{port}"},
        **{"SLURM_TASKS_PER_NODE": tasks, "SLURM_STEP_TASKS_PER_NODE": tasks},
        **{"SLURM_JOB_NODELIST": hosts, "SLURM_STEP_NODELIST": hosts},
        **{"SLURM_PROCID": f"{rank}", "SLURM_LOCALID": f"{local}", "SLURM_NODEID": f"{node}"},
    }


def open_mpi(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What mpirun of Open MPI sets, and where to meet."""
    return {
        "OMPI_COMM_WORLD_RANK": f"{rank}",
        "OMPI_COMM_WORLD_SIZE": f"{num_nodes * ranks_per_node}",
        "OMPI_COMM_WORLD_LOCAL_RANK": f"{rank % ranks_per_node}",
        "OMPI_COMM_WORLD_LOCAL_SIZE": f"{ranks_per_node}",
        "MASTER_ADDR": "node0",
        "MASTER_PORT": f"{port}",
    }


def jsrun(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What jsrun sets."""
    return {
        "LSB_JOBID": "31415",
        "LSB_MCPU_HOSTS": "batch3 1 " + " ".join(f"h{node} {ranks_per_node}" for node in range(num_nodes)),
        "JSM_NAMESPACE_RANK": f"{rank}",
        "JSM_NAMESPACE_SIZE": f"{num_nodes * ranks_per_node}",
        "JSM_NAMESPACE_LOCAL_RANK": f"{rank % ranks_per_node}",
        "JSM_NAMESPACE_LOCAL_SIZE": f"{ranks_per_node}",
        "MASTER_PORT": f"{port}",
    }


def pod(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What the operator sets in each pod of a PyTorchJob."""
    return {
        "KUBERNETES_PORT": "tcp://10.0.0.1:443",
        "MASTER_ADDR": "job-master-0",
        "MASTER_PORT": f"{port}",
        "WORLD_SIZE": f"{num_nodes}",
        "RANK": f"{rank}",
    }


def by_hand(self: Any, *, num_nodes: int, ranks_per_node: int, rank: int, port: int) -> dict[str, str]:
    """What somebody sets who starts each rank in a shell of its own."""
    node, local = divmod(rank, ranks_per_node)
    return {
        **{"LOCAL_RANK": f"{local}", "NODE_RANK": f"{node}", "WORLD_SIZE": f"{num_nodes * ranks_per_node}"},
        **{"LOCAL_WORLD_SIZE": f"{ranks_per_node}", "MASTER_PORT": f"{port}"},
        "MASTER_ADDR": "127.0.0.1" if num_nodes == 1 else "node0",
    }


globals().update(
    of_builtins(
        "environment",
        EnvironmentContract,
        local={"variables": nothing},
        torchelastic={"variables": torchrun},
        slurm={"variables": srun},
        mpi={"variables": open_mpi},
        lsf={"variables": jsrun},
        manual={"variables": by_hand},
        simulate={"variables": nothing, "options": {"ranks": 1}},
        kubeflow={"variables": pod, "shapes": ((1, 1), (2, 1), (3, 1))},
    )
)
