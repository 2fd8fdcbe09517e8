"""A logger that writes one CSV file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from plugframe.base import Logger
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe.hooks.context import Context
from plugframe_builtins._shared.version_folder import new_version
from plugframe_builtins.csv_logger import plugin
from plugframe_builtins.csv_logger.table import STEP, Table


class CSVLogger(Logger):
    """Write ``<folder>/version_N/metrics.csv``: a row for each step, a column for each metric, on rank 0.

    Values logged for one step share a row; of a metric logged twice the later value counts.

    Args:
        folder: parent folder of the runs; files of earlier runs are never changed.
        flush_rows: rows kept in memory before they are written.

    Attributes:
        path: the CSV file of this run, None before set-up.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs", *, flush_rows: int = 100) -> None:
        plugin.validate(self, flush_rows=flush_rows)
        self.folder = Path(folder)
        self.flush_rows = flush_rows
        self.path: Path | None = None
        self._table: Table | None = None

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        if context.world.global_rank == 0:
            self.calls = 0
            self.path = new_version(self.folder) / "metrics.csv"
            self._table = Table(self.path)

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if self._table is None:
            return
        if STEP in metrics:
            raise SettingError(f"log({STEP!r}): the column {STEP!r} holds the step's number; choose another name.")
        number = self.next_step(step)
        self._table.add(number, metrics)
        if len(self._table.pending) > self.flush_rows:
            self._table.flush(but=number)  # more values of this step may follow

    @hookimpl
    def logger_teardown(self) -> None:
        table, self._table = self._table, None
        if table is not None:
            table.flush()
