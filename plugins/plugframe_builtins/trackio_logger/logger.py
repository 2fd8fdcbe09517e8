"""A logger that records runs with Trackio."""

from __future__ import annotations

import contextvars
import sys
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from uuid import uuid4

from plugframe.base import Logger, warn_caller
from plugframe.hooks import Artifact, Context, HyperParameter, artifact_kind, hookimpl
from plugframe_builtins._shared.library import library, require
from plugframe_builtins._shared.png import encode_png
from plugframe_builtins.trackio_logger import plugin


class TrackioLogger(Logger):
    """Record the run with Trackio on rank 0, from its first record on; view it with ``trackio show``.

    The database is in the folder ``TRACKIO_DIR``, which Trackio reads when it is imported. A run that fails has an
    alert of the level ``error``.

    Args:
        project: the project of the run.
        group: the group of runs that this one belongs to.
        space: the Hugging Face Space to record on, instead of the local database.
        resume: whether to continue the run of a loaded checkpoint.

    Raises:
        MissingDependencyError: if trackio is not installed.
    """

    def __init__(self, *, project: str = "plugframe", group: str = "", space: str = "", resume: bool = True) -> None:
        require("trackio", "plugframe[trackio]", "TrackioLogger")
        plugin.validate(self, project=project, group=group, space=space, resume=resume)
        self.project, self.group, self.space, self.resume = project, group, space, resume
        self._id: str | None = None
        self._writes = False
        self._run: Any = None

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        self.calls, self._run = 0, None
        self._writes = context.world.global_rank == 0
        self._id = f"run-{uuid4().hex[:12]}" if self._writes else None

    def run(self) -> Any:
        """Return the run, begun with the first record: a checkpoint may name another one until then."""
        if self._run is None:
            settings = {
                "project": self.project,
                "name": self._id,
                "group": self.group or None,
                "space_id": self.space or None,
                "resume": "allow",
                "embed": False,
            }
            with redirect_stdout(sys.stderr):
                # In a context of its own: init() finishes the run that it finds in the current one.
                self._run = contextvars.Context().run(library("trackio").init, **settings)
        return self._run

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.run().log(dict(metrics), step=self.next_step(step))

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        run = self.run()
        run.config.update(params)
        # A hack: Trackio sends the settings of a run once, with its first record, has no call to add some, and of
        # two records that it writes together it takes those of the first.
        with run._client_lock:
            run._flush_queues_inline()
        run._config_logged = False
        run.log({}, step=max(self.calls - 1, 0))

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        trackio, run, kind = library("trackio"), self.run(), artifact_kind(value)
        item: Any = value
        if isinstance(value, Path):
            at = "" if step is None else f"-step{step}"
            run.log_artifact(value, name=f"{name.replace('/', '-')}{at}", type="file")
            return
        with tempfile.TemporaryDirectory() as folder:
            if kind == "image":
                source = Path(folder) / "image.png"
                source.write_bytes(encode_png(item))
                item = trackio.Image(source)
            elif kind == "table":
                item = trackio.Table(data=[dict(row) for row in item])
            else:
                item = trackio.Markdown(item)
            run.log({name: item}, step=max(self.calls - 1, 0) if step is None else step)

    @hookimpl
    def logger_run_id(self) -> str | None:
        return self._id

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        if not self.resume or not self._writes or "run_id" not in state:
            return
        if self._run is not None and state["run_id"] != self._id:
            warn_caller(f"TrackioLogger has begun run {self._id}, and does not continue run {state['run_id']}.")
            return
        self._id = state["run_id"]
        super().logger_load_state(state)

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        if not self._writes or (self._run is None and error is None):
            return
        run = self.run()
        with redirect_stdout(sys.stderr):
            if error is not None:
                level = library("trackio").AlertLevel.ERROR
                run.alert("The run failed", f"{type(error).__name__}: {error}", level=level)
            run.finish()
        self._run, self._writes = None, False
