"""Requeue SLURM jobs."""

from __future__ import annotations

import os
import subprocess
import warnings

from plugframe.errors import PlugframeWarning


def requeue() -> bool:
    """Requeue the SLURM job of this process; return whether that succeeded.

    A task of a job array is requeued alone. Returns False outside of a job, and if ``scontrol`` fails.
    """
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ and "SLURM_ARRAY_TASK_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    if not job:
        return False
    try:
        done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, timeout=30, check=False)
        problem = "" if done.returncode == 0 else (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
    except (OSError, subprocess.TimeoutExpired) as error:
        problem = str(error)
    if problem:
        warnings.warn(f"'scontrol requeue {job}' failed: {problem}.", PlugframeWarning, stacklevel=3)
    return not problem
