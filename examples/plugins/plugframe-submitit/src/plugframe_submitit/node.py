"""The task that submitit runs on each node: it starts and monitors the ranks there."""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass, replace
from typing import Any

import submitit

from plugframe.errors import RankFailedError, UsageError
from plugframe.hooks import Job
from plugframe.launch import supervise

_DEVICES = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The outcome of a task.

    Attributes:
        result: return value of the function on rank 0, on node 0 only.
        report: report of a failed rank; empty if none failed.
        usage_error: message of the error that prevented the start; empty if the job started.
        exit_code: exit code of the job.
    """

    result: Any = None
    report: str = ""
    usage_error: str = ""
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Node:
    """The task of one node.

    Attributes:
        job: the job without its function.
        call: function and arguments, pickled by value; empty for a script.
        path: ``sys.path`` of the submitting process.
        devices: visible GPUs of the submitting process, for local jobs; None otherwise.
    """

    job: Job
    call: bytes
    path: tuple[str, ...]
    devices: str | None

    def __call__(self) -> Outcome:
        sys.path.extend(folder for folder in self.path if folder not in sys.path)
        if self.devices is not None:
            # submitit hides all GPUs from local jobs.
            os.environ.pop(_DEVICES, None)
            os.environ.update({_DEVICES: self.devices} if self.devices else {})
        try:
            return Outcome(result=self._run())
        except RankFailedError as error:
            return Outcome(report=error.report, exit_code=error.exit_code)
        except UsageError as error:
            return Outcome(usage_error=str(error))

    def _run(self) -> Any:
        job, environment = self.job, submitit.JobEnvironment()
        if job.num_nodes > 1:
            job = replace(
                job,
                node_rank=environment.node,
                main_address=job.main_address or environment.hostnames[0],
                main_port=job.main_port or _port(environment.raw_job_id),
            )
        if not self.call:
            return supervise(job)
        function, args = pickle.loads(self.call)
        # Fork, so that the function need not be importable; this process has not initialized anything yet.
        return supervise(replace(job, function=function, args=args), start_method="fork")


def _port(job_id: str) -> int:
    """Derive a port from the job id, the same on all nodes."""
    return 20_000 + int("".join(filter(str.isdigit, job_id)) or 0) % 10_000


def visible_devices() -> str:
    """Return the GPUs visible to ranks on this host; empty for all."""
    return os.environ.get(_DEVICES, "")
