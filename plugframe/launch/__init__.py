"""Start, supervise and stop the ranks of a job, and report failures.

Importing this package does not import torch; the first call of `supervise` does.
"""

from __future__ import annotations

from typing import Any

from plugframe.hooks.launcher import Job
from plugframe.launch.command import script_command
from plugframe.launch.function import refuse_while_importing
from plugframe.launch.inline import Rendezvous, run_as_rank

__all__ = ["Job", "Rendezvous", "run_as_rank", "script_command", "supervise"]


def supervise(job: Job, *, start_method: str | None = None) -> Any:
    """Start the ranks of `job` on this node, wait for them, and return what its function returned on rank 0.

    Args:
        job: a script (`Job.command`) or a function (`Job.function`).
        start_method: multiprocessing's start method. A function needs one. The ranks of a script are forked from this
            process (``"fork"``) or started in fresh interpreters (``"spawn"``); None forks if `Job.forkable` allows it.

    Raises:
        RankFailedError: if a rank failed, or a signal stopped the job (exit code 128 + signal number).
        UsageError: if the job cannot be started with these settings.
    """
    refuse_while_importing()
    from plugframe.launch.engine import supervise as run

    return run(job, start_method=start_method)
