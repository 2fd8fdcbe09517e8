"""What submitit runs: a task on each node, which starts and watches over the ranks there."""

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
    """What came of a task.

    Attributes:
        result: what the function returned on rank 0, on node 0.
        report: of a rank that failed; empty if none did.
        refusal: why the job could not be started; empty if it was.
        exit_code: what the job should exit with.
    """

    result: Any = None
    report: str = ""
    refusal: str = ""
    exit_code: int = 0


@dataclass(frozen=True, kw_only=True)
class Node:
    """The task of one node.

    Attributes:
        job: without its function.
        call: the function and its arguments, pickled by value; empty for a script.
        path: where modules were found when the job was submitted.
        devices: the GPUs that were to be seen there, on this very host; None on another.
    """

    job: Job
    call: bytes
    path: tuple[str, ...]
    devices: str | None

    def __call__(self) -> Outcome:
        sys.path.extend(folder for folder in self.path if folder not in sys.path)
        if self.devices is not None:
            # submitit's local jobs would see none.
            os.environ.pop(_DEVICES, None)
            os.environ.update({_DEVICES: self.devices} if self.devices else {})
        try:
            return Outcome(result=self._run())
        except RankFailedError as error:
            return Outcome(report=error.report, exit_code=error.exit_code)
        except UsageError as error:
            return Outcome(refusal=str(error))

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
        # In copies of this process, which has done nothing yet: the function need not be importable.
        return supervise(replace(job, function=function, args=args), start_method="fork")


def _port(job_id: str) -> int:
    """Return a port that all nodes derive from the number of their job."""
    return 20_000 + int("".join(filter(str.isdigit, job_id)) or 0) % 10_000


def visible_devices() -> str:
    """Return the GPUs that ranks started here would see; empty for all."""
    return os.environ.get(_DEVICES, "")
