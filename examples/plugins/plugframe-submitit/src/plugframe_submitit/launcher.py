"""The launcher based on submitit."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle  # type: ignore[import-untyped]
import submitit

from plugframe.base import Launcher
from plugframe.errors import RankFailedError, SettingError, UsageError
from plugframe.hooks import Job, hookimpl
from plugframe_submitit.node import Node, Outcome, visible_devices
from plugframe_submitit.output import OutputForwarder

_POLL_S = 0.1
#: Time limit for a cancelled job to end.
_CANCEL_TIMEOUT_S = 20.0


class Submitit(Launcher):
    """Submit the job, stream its output, and return its result.

    submitit runs a task on every node, which starts and monitors the ranks there like ``plugframe run`` on that node:
    restarts, reports and signals are the same. Ctrl-C cancels the job.

    Args:
        folder: folder of submissions, outputs and results, visible to all nodes.
        cluster: ``"slurm"``, or ``"local"`` for processes on this host; by default SLURM if ``sbatch`` is available.
        timeout_min: time limit of the job in minutes.
        gpus_per_node: GPUs per node to request from SLURM.
        slurm: more SLURM parameters of submitit, such as ``{"partition": "big"}``.
    """

    def __init__(
        self,
        *,
        folder: str = "submitit",
        cluster: str | None = None,
        timeout_min: int = 60,
        gpus_per_node: int | None = None,
        slurm: Mapping[str, str] | None = None,
    ) -> None:
        if cluster not in (None, "slurm", "local"):
            raise SettingError(f"cluster={cluster!r} is not supported: use 'slurm', 'local', or leave it out.")
        if timeout_min < 1:
            raise SettingError(f"timeout_min={timeout_min!r} must be a number of minutes, 1 or more.")
        self.folder, self.cluster, self.timeout_min = folder, cluster, timeout_min
        self.gpus_per_node, self.slurm = gpus_per_node, dict(slurm or {})

    @hookimpl
    def launcher_launch(self, job: Job) -> Any:
        call = _pickled(job) if job.function is not None else b""
        executor = self._executor(job)
        local = executor.cluster == "local"
        node = Node(
            job=replace(job, function=None, args=()),
            call=call,
            path=tuple(sys.path),
            devices=visible_devices() if local else None,
        )
        submitted = executor.submit(node)
        print(f"submitit: {executor.cluster} job {submitted.job_id}, outputs in {self.folder}", file=sys.stderr)
        return self._outcome(submitted)

    def _executor(self, job: Job) -> submitit.AutoExecutor:
        try:
            executor = submitit.AutoExecutor(folder=Path(self.folder).absolute(), cluster=self.cluster)
            executor.update_parameters(
                name="plugframe",
                timeout_min=self.timeout_min,
                nodes=job.num_nodes,
                tasks_per_node=1,
                **({} if self.gpus_per_node is None else {"gpus_per_node": self.gpus_per_node}),
                **{f"slurm_{name}": value for name, value in self.slurm.items()},
            )
        except (NameError, RuntimeError, TypeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise UsageError(f"launcher='submitit' cannot submit this job: {reason}") from error
        return executor

    def _outcome(self, submitted: Any) -> Any:
        forwarder = OutputForwarder(submitted)
        try:
            while not submitted.done():
                forwarder.forward()
                time.sleep(_POLL_S)
        except BaseException:
            submitted.cancel(check=False)
            deadline = time.monotonic() + _CANCEL_TIMEOUT_S
            while not submitted.done() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
            raise
        finally:
            forwarder.forward(last=True)
        outcomes: list[Outcome] = []
        try:
            outcomes = submitted.results()
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as error:
            raise RankFailedError(
                f"submitit job {submitted.job_id} ended without a result ({submitted.state}): it was cancelled, ran "
                f"out of time or memory, or its node failed. See its outputs in {self.folder}.\n{error}"
            ) from None
        for outcome in outcomes:
            if outcome.usage_error:
                raise UsageError(outcome.usage_error)
            if outcome.report:
                raise RankFailedError(outcome.report, exit_code=outcome.exit_code)
        return outcomes[0].result


def _pickled(job: Job) -> bytes:
    try:
        data: bytes = cloudpickle.dumps((job.function, job.args))
    except Exception as error:
        name = getattr(job.function, "__qualname__", type(job.function).__name__)
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UsageError(f"launcher='submitit' cannot send the function {name} to the ranks ({reason}).") from error
    return data
