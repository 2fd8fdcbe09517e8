"""Start ranks, watch over them, and say once what went wrong.

Light to import: torch comes with the first call of `supervise`.
"""

from __future__ import annotations

from typing import Any

from plugframe.hooks.launcher import Job
from plugframe.launch.command import script_command
from plugframe.launch.function import refuse_while_importing

__all__ = ["Job", "script_command", "supervise"]


def supervise(job: Job, *, start_method: str | None = None) -> Any:
    """Start the ranks of `job` on this node, wait until all have ended, return what its function returned on rank 0.

    Args:
        job: a script (`Job.command`) or a function (`Job.function`).
        start_method: how multiprocessing starts a process, for a function.

    Raises:
        RankFailedError: if a rank failed, or a signal ended the job (exit code 128 + its number).
        UsageError: if the job cannot be started like this.
    """
    refuse_while_importing()
    from plugframe.launch.engine import supervise as run

    return run(job, start_method=start_method)
