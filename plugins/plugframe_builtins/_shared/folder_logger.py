"""A logger that records each run in a folder of its own, and continues the run of a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from plugframe.base import Logger, warn_caller
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.run_folder import RunFolder


class FolderLogger(Logger):
    """Base class: a subclass gives `open_run` and `close_run`, and asks for `recording` before it records.

    The run of a loaded checkpoint is continued at the next record, not at the load, which may be undone. What was
    recorded before goes along, except for metrics: once there are some, this is a run of its own.

    Attributes:
        run: the run that is recorded; None before set-up and on ranks other than 0.
    """

    def __init__(self, folder: str | os.PathLike[str], resume: bool) -> None:
        self.folder = Path(folder)
        self.resume = resume
        self.run: RunFolder | None = None
        self._open: RunFolder | None = None
        self._has_metrics = False
        self._begins = True

    def open_run(self, run: RunFolder) -> None:
        """Open the files of a run; a continued run has those of the jobs before."""
        raise NotImplementedError

    def close_run(self) -> None:
        """Write and close the files of the open run."""
        raise NotImplementedError

    @property
    def recording(self) -> RunFolder | None:
        """The run to record in, open; None on ranks other than 0, and outside of a job."""
        run, begun = self.run, self._open
        if run is None or begun is None or run is begun:
            return begun
        self.close_run()
        run.begin()
        self._open = run
        self.open_run(run)
        run.take_over(begun)
        # Another load cannot take it elsewhere: it is not only this job's.
        self._has_metrics = True
        return run

    def next_step(self, step: int | None) -> int:
        number = super().next_step(step)
        if self._open is not None and self._begins:
            self._begins = False
            self._open.began_at(number)
        self._has_metrics = True
        return number

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        if context.world.global_rank == 0:
            self.calls, self._has_metrics, self._begins = 0, False, True
            self.run = self._open = RunFolder.create(self.folder)
            self.open_run(self.run)

    @hookimpl
    def logger_run_id(self) -> str | None:
        return None if self.run is None else self.run.run_id

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        run_id, begun = state.get("run_id"), self._open
        if not self.resume or begun is None or run_id is None:
            return
        found = begun if run_id == begun.run_id else RunFolder.find(self.folder, run_id)
        if found is None:
            reason = f"it is not in {str(self.folder)!r}"
        elif self._has_metrics and found is not begun:
            reason = "this job has logged metrics before the load"
        elif not found.lock():
            reason = "another process records it"
        else:
            self.run = found
            super().logger_load_state(state)
            return
        warn_caller(
            f"{type(self).__name__} records {begun.path.name}, and does not continue run {run_id} of the checkpoint: "
            f"{reason}."
        )

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        run = self.recording
        if run is not None:
            self.close_run()
            run.end(error)
            self._open = None
