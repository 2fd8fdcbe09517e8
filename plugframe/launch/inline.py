"""Become a rank in a process that exists already: an actor of Ray, a worker of Dask or Spark."""

from __future__ import annotations

import os
import secrets
from dataclasses import dataclass, field
from typing import Any

from plugframe.errors import UsageError
from plugframe.hooks.launcher import Job
from plugframe.hooks.variables import JOB_SEED, LAUNCHED, TOKEN
from plugframe.hooks.world import World
from plugframe.launch.inheritance import unmarked
from plugframe.utils.environment import environment, preserved_environment


@dataclass(frozen=True, kw_only=True)
class Rendezvous:
    """Where the ranks of one job connect. Make it once, and send it to every worker.

    Attributes:
        address: host name or address of the worker that becomes rank 0.
        port: a free port there.
        token: a secret of the job: processes without it cannot connect.
        seed: what the ranks seed themselves from if the script does not.
    """

    address: str
    port: int
    token: str = field(default_factory=lambda: secrets.token_hex(32), repr=False)
    seed: str = field(default_factory=lambda: os.urandom(8).hex())


def run_as_rank(job: Job, world: World, rendezvous: Rendezvous) -> Any:
    """Become a rank of `job` in this process, call its function, and return what that returned.

    Every rank of `world` must call it, each in a process of its own, at about the same time. Afterwards the process is
    what it was. The launcher has to watch the processes, and to end all of them if one fails.

    Args:
        job: a job with a function.
        world: the place of this rank.
        rendezvous: the same on all ranks.

    Raises:
        UsageError: if `job` is a script: a process can become another script only by starting it.
    """
    if job.function is None:
        raise UsageError("run_as_rank() takes a job with a function, and this one runs a script: use supervise().")
    variables = {
        "RANK": world.global_rank,
        "LOCAL_RANK": world.local_rank,
        "NODE_RANK": world.node_rank,
        "WORLD_SIZE": world.world_size,
        "LOCAL_WORLD_SIZE": world.local_world_size,
        "MASTER_ADDR": rendezvous.address,
        "MASTER_PORT": rendezvous.port,
    }
    shared = {LAUNCHED: "1", TOKEN: rendezvous.token, JOB_SEED: rendezvous.seed}
    wanted = {**job.environ, **shared, **{name: str(value) for name, value in variables.items()}}
    # A Lite leaves a mark in the environment for programs that the script starts.
    with preserved_environment(), environment(wanted), unmarked():
        return job.function(*job.args)
