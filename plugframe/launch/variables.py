"""Environment variables that ranks inherit from their launcher."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from plugframe.hooks.launcher import Job
from plugframe.hooks.variables import JOB_SEED, LAUNCHED, TOKEN
from plugframe.launch.inheritance import unmarked
from plugframe.utils.environment import environment


@contextmanager
def variables_of_ranks(job: Job, extra: Mapping[str, str]) -> Iterator[None]:
    """Set the ranks' variables in this process, which the ranks inherit; restore them at the end."""
    wanted = {**job.environ, **extra, LAUNCHED: "1"}
    if TOKEN not in os.environ and job.num_nodes == 1 and job.min_nodes is None:
        # Launchers of several nodes cannot agree on a token by themselves.
        wanted[TOKEN] = secrets.token_hex(32)
    if job.num_nodes == 1:  # with several nodes, the seed is shared through their store
        wanted[JOB_SEED] = os.urandom(8).hex()
    if "OMP_NUM_THREADS" not in os.environ:
        # Divide the cores among the ranks: torch's default, all cores in every rank, is many times slower.
        wanted.setdefault("OMP_NUM_THREADS", str(max(1, _num_cores() // job.num_processes)))
    with environment(wanted), unmarked():
        yield


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
