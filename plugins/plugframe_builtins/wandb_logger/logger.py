"""A logger that records runs with Weights & Biases."""

from __future__ import annotations

import shutil
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal
from uuid import uuid4

from plugframe.base import Logger, warn_caller
from plugframe.errors import SettingError
from plugframe.hooks import Artifact, Context, HyperParameter, artifact_kind, hookimpl
from plugframe_builtins._shared.library import library, require
from plugframe_builtins.wandb_logger import plugin

#: The column of steps. wandb's own steps must rise, and it drops what comes late.
STEP = "global_step"


class WandbLogger(Logger):
    """Record the run with wandb on rank 0, from its first record on.

    Args:
        project: the project of the run.
        run_name: its name.
        group: the group of runs that it belongs to.
        entity: the user or team that owns it.
        folder: where wandb keeps its folder ``wandb``.
        mode: ``"online"``, or ``"offline"`` for a run that ``wandb sync`` sends later.
        resume: whether to continue the run of a loaded checkpoint.

    Attributes:
        path: the folder of the files of the run; None before its first record.

    Raises:
        MissingDependencyError: if wandb is not installed.
    """

    def __init__(
        self,
        *,
        project: str = "plugframe",
        run_name: str = "",
        group: str = "",
        entity: str = "",
        folder: str = "runs",
        mode: Literal["online", "offline"] = "online",
        resume: bool = True,
    ) -> None:
        require("wandb", "plugframe[wandb]", "WandbLogger")
        plugin.validate(self, project=project, run_name=run_name, group=group, entity=entity, mode=mode, resume=resume)
        self.project, self.folder, self.mode, self.resume = project, folder, mode, resume
        self._names = {"name": run_name or None, "group": group or None, "entity": entity or None}
        self.path: Path | None = None
        self._id: str | None = None
        self._run: Any = None

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        self.calls, self._run = 0, None
        self._id = uuid4().hex[:12] if context.world.global_rank == 0 else None

    def run(self) -> Any:
        """Return the run, begun with the first record: a checkpoint may name another one until then."""
        if self._run is None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
            self._hooks = sys.exit, sys.excepthook
            self._run = library("wandb").init(
                project=self.project,
                dir=self.folder,
                mode=self.mode,
                id=self._id,
                resume="allow",
                reinit="create_new",
                **self._names,
            )
            self._run.define_metric("*", step_metric=STEP)
            self.path = Path(self._run.dir)
        return self._run

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if STEP in metrics:
            raise SettingError(f"log({STEP!r}): the column {STEP!r} holds the step's number; choose another name.")
        self.run().log({**metrics, STEP: self.next_step(step)})

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        self.run().config.update(dict(params), allow_val_change=True)

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        wandb, run, kind = library("wandb"), self.run(), artifact_kind(value)
        item: Any = value
        if isinstance(value, Path):
            at = "" if step is None else f"@{step}"
            target = Path(run.dir) / f"{name.removesuffix(value.suffix)}{at}{value.suffix}"
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(value, target)
            run.save(str(target), base_path=run.dir, policy="now")
            return
        if kind == "image":
            # An array of shape (H, W, C), and (H, W) for gray.
            item = wandb.Image(item[0].numpy() if len(item) == 1 else item.permute(1, 2, 0).numpy())
        elif kind == "table":
            columns = list(item[0]) if item else []
            item = wandb.Table(columns=columns, data=[list(row.values()) for row in item], allow_mixed_types=True)
        run.log({name: item} if step is None else {name: item, STEP: step})

    @hookimpl
    def logger_run_id(self) -> str | None:
        return self._id

    @hookimpl
    def logger_load_state(self, state: dict[str, Any]) -> None:
        if not self.resume or self._id is None or "run_id" not in state:
            return
        if self._run is not None and state["run_id"] != self._id:
            warn_caller(f"WandbLogger has begun run {self._id}, and does not continue run {state['run_id']}.")
            return
        self._id = state["run_id"]
        super().logger_load_state(state)

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        if self._id is None or (self._run is None and error is None):
            return
        run, self._run, self._id = self.run(), None, None
        # At the end of a process without a `with` block wandb has finished the run itself, with its exit code.
        if threading.main_thread().is_alive():
            wandb = library("wandb")
            run.finish(exit_code=0 if error is None else 1)
            if wandb.setup().most_recent_active_run is None:
                wandb.teardown()
        sys.exit, sys.excepthook = self._hooks
