"""The environment of srun."""

from __future__ import annotations

import os

from plugframe.base import Environment
from plugframe.errors import EnvironmentMismatchError
from plugframe.hooks import hookimpl
from plugframe.hooks.world import World
from plugframe_builtins._shared.requeue import requeue
from plugframe_builtins.slurm.lists import expand_hosts, expand_tasks

#: Step ids from here on are no srun steps: a batch script, or the shell of salloc.
SPECIAL_STEPS = 0xFFFF_FFF0


class Slurm(Environment):
    """The tasks of one srun.

    They connect to the first host of the step, on a port derived from the job and step ids. ``MASTER_ADDR``
    and ``MASTER_PORT`` override them. Each node must run the same number of tasks.
    """

    name = "SLURM"
    processes_hint = "srun --ntasks-per-node={n}"
    nodes_hint = "srun --nodes={n}"

    @hookimpl
    def environment_detect(self) -> bool:
        """Return whether srun started this process, or a batch script of several tasks did, which is an error.

        Interactive shells (salloc, ``srun --pty bash``) do not count: their commands may launch ranks freely.
        """
        if _in_step():
            return not ("SLURM_PTY_PORT" in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS") == "1")
        tasks = os.environ.get("SLURM_NTASKS", "")
        return os.environ.get("ENVIRONMENT") == "BATCH" and tasks.isdigit() and int(tasks) > 1

    @hookimpl
    def environment_world(self) -> World:
        if not _in_step():
            tasks = os.environ.get("SLURM_NTASKS", "1")
            raise EnvironmentMismatchError(
                f"This job has SLURM_NTASKS={tasks}, and this one process was started without srun: type 'srun "
                "python train.py' to run it in all tasks, or set environment='local'."
            )
        names = {
            "global_rank": "SLURM_PROCID",
            "local_rank": "SLURM_LOCALID",
            "node_rank": "SLURM_NODEID",
            # The step's variables first: the job's may exceed this srun's.
            "world_size": _first("SLURM_STEP_NUM_TASKS", "SLURM_NTASKS"),
            "num_nodes": _first("SLURM_STEP_NUM_NODES", "SLURM_NNODES", "SLURM_JOB_NUM_NODES"),
        }
        figures = {field: self.read_int(variable) for field, variable in names.items()}
        names["local_world_size"] = _first("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE", "SLURM_NTASKS_PER_NODE")
        return self.checked(World(**figures, local_world_size=self._per_node(names["local_world_size"])), names)

    @hookimpl
    def environment_requeue(self) -> bool:
        return requeue()

    def _per_node(self, variable: str) -> int:
        text = os.environ.get(variable)
        if text is None:
            return self.read_int(variable)
        tasks = set(expand_tasks(variable, text))
        if len(tasks) != 1:
            raise EnvironmentMismatchError(
                f"{variable}={text}: every node must run as many processes as the others, type "
                f"'srun --ntasks-per-node={min(tasks)}'."
            )
        return tasks.pop()

    def main(self) -> tuple[str, int]:
        # Steps of one job can run side by side on one host.
        port = self.main_port(self.read_int("SLURM_JOB_ID") + 1009 * self.read_int("SLURM_STEP_ID"))
        if self.environment_world().num_nodes == 1:
            return "127.0.0.1", port
        address = os.environ.get("MASTER_ADDR")
        if address:
            return address, port
        variable = _first("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST")
        return next(expand_hosts(variable, os.environ.get(variable, ""))), port


def _in_step() -> bool:
    step = os.environ.get("SLURM_STEP_ID", "")
    return step.isdigit() and int(step) < SPECIAL_STEPS


def _first(*variables: str) -> str:
    """Return the first variable that is set, else the first."""
    return next((variable for variable in variables if variable in os.environ), variables[0])
