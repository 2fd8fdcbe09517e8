"""A logger that writes one CSV file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from plugframe.errors import SettingError
from plugframe.hooks import Artifact, HyperParameter, hookimpl
from plugframe_builtins._shared.folder_logger import FolderLogger
from plugframe_builtins._shared.run_folder import RunFolder
from plugframe_builtins.csv_logger import plugin
from plugframe_builtins.csv_logger.table import STEP, Table

METRICS = "metrics.csv"


class CSVLogger(FolderLogger):
    """Write ``<folder>/version_N/metrics.csv``: a row for each step, a column for each metric, on rank 0.

    Values logged for one step share a row; of a metric logged twice the later value counts. Beside it are
    ``run.json``, ``hparams.json`` and ``artifacts/``. A run resumed from a checkpoint goes on in its folder.

    Args:
        folder: parent folder of the runs; files of other runs are never changed.
        flush_rows: rows kept in memory before they are written.
        resume: whether to continue the run of a loaded checkpoint; False records a new run.

    Attributes:
        path: the CSV file of this run, None before set-up.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs", *, flush_rows: int = 100, resume: bool = True) -> None:
        plugin.validate(self, flush_rows=flush_rows, resume=resume)
        super().__init__(folder, resume)
        self.flush_rows = flush_rows
        self._table: Table | None = None

    @property
    def path(self) -> Path | None:
        """The CSV file of this run, None before set-up."""
        return None if self.run is None else self.run.path / METRICS

    def open_run(self, run: RunFolder) -> None:
        self._table = Table(run.path / METRICS)

    def close_run(self) -> None:
        table, self._table = self._table, None
        if table is not None:
            table.flush()

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if STEP in metrics:
            raise SettingError(f"log({STEP!r}): the column {STEP!r} holds the step's number; choose another name.")
        if self.recording is None or self._table is None:
            return
        number = self.next_step(step)
        self._table.add(number, metrics)
        if len(self._table.pending) > self.flush_rows:
            self._table.flush(but=number)  # more values of this step may follow

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        run = self.recording
        if run is not None:
            run.add_hyperparams(params)

    @hookimpl
    def logger_log_artifact(self, name: str, value: Artifact, step: int | None) -> None:
        run = self.recording
        if run is not None:
            run.add_artifact(name, value, step)
