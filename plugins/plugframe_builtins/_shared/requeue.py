"""Asking SLURM to start a job again."""

from __future__ import annotations

import os
import subprocess
import warnings

from plugframe.errors import PlugframeWarning


def requeue() -> bool:
    """Have SLURM put the job this process belongs to back into its queue; say whether that was done.

    A job array's task is one by its own number. Without a job, or a ``scontrol`` that does it, the answer is no.
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
