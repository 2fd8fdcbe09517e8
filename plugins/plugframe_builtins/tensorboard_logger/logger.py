"""A logger that writes TensorBoard event files."""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from plugframe.base import warn_caller
from plugframe.errors import MissingDependencyError
from plugframe.hooks import Artifact, HyperParameter, artifact_kind, hookimpl
from plugframe_builtins._shared.folder_logger import FolderLogger
from plugframe_builtins._shared.run_folder import RunFolder
from plugframe_builtins.tensorboard_logger import plugin

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


class TensorBoardLogger(FolderLogger):
    """Write scalars into ``<folder>/version_N``, on rank 0; view them with ``tensorboard --logdir <folder>``.

    Hyperparameters, images, texts and tables are in the event file too; files are copied to ``artifacts/``, where
    tables are as CSV. A run resumed from a checkpoint goes on in its folder.

    Args:
        folder: parent folder of the runs; files of other runs are never changed.
        resume: whether to continue the run of a loaded checkpoint; False records a new run.

    Attributes:
        path: the folder of this run, None before set-up.

    Raises:
        MissingDependencyError: if tensorboard is not installed.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs/tensorboard", *, resume: bool = True) -> None:
        # Checked here on every rank; at set-up only rank 0 would fail.
        if importlib.util.find_spec("tensorboard") is None:
            raise MissingDependencyError(
                "TensorBoardLogger needs tensorboard: type \"pip install 'plugframe[tensorboard]'\"."
            )
        plugin.validate(self, resume=resume)
        super().__init__(folder, resume)
        self._writer: SummaryWriter | None = None
        self._shown = False

    @property
    def path(self) -> Path | None:
        """The folder of this run, None before set-up."""
        return None if self.run is None else self.run.path

    def open_run(self, run: RunFolder) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(run.path))
        self._shown = bool(run.hyperparams())  # by the job that is continued

    def close_run(self) -> None:
        if self.run is self._open:
            self._show_hyperparams()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if self.recording is None or self._writer is None:
            return
        self._show_hyperparams()
        number = self.next_step(step)
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, number)

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        run = self.recording
        if run is None:
            return
        before = run.hyperparams()
        if run.add_hyperparams(params) == before:
            return
        if self._shown:
            # TensorBoard reads the first summary of a run only.
            warn_caller(
                f"TensorBoard shows the hyperparameters from before the first metric: {', '.join(params)} "
                f"{'is' if len(params) == 1 else 'are'} in {str(run.path / 'hparams.json')!r} alone."
            )

    def _show_hyperparams(self) -> None:
        """Write the hyperparameters of the run, once."""
        values = self._open.hyperparams() if self._open is not None else {}
        if self._shown or not values or self._writer is None or self._writer.file_writer is None:
            return
        from torch.utils.tensorboard.summary import hparams

        # Not add_hparams, which writes a run of its own into a folder of its own.
        for summary in hparams({name: _cell(value) for name, value in values.items()}, {}):
            self._writer.file_writer.add_summary(summary)
        self._shown = True

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        run, kind = self.recording, artifact_kind(value)
        if run is None or self._writer is None:
            return
        if kind == "image":
            self._writer.add_image(name, value, step)
        elif kind == "text":
            self._writer.add_text(name, value, step)
        else:
            run.add_artifact(name, value, step)
        if kind == "table":
            self._writer.add_text(name, _markdown(value), step)


def _cell(value: HyperParameter) -> str | int | float | bool:
    """Return a value that TensorBoard has a column for."""
    return value if isinstance(value, (str, int, float)) else json.dumps(value)


def _markdown(rows: Any) -> str:
    """Return a table as Markdown."""
    columns = list(rows[0]) if rows else []
    lines = [columns, ["---"] * len(columns), *([row[name] for name in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in line)} |" for line in lines)
