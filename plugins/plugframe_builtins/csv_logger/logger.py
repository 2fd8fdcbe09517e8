"""A logger that writes one CSV file."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from plugframe.base import Logger
from plugframe.context import Context
from plugframe.errors import SettingError
from plugframe.hooks import hookimpl
from plugframe_builtins.versions import new_version

_STEP = "step"


class CSVLogger(Logger):
    """Write ``<folder>/version_N/metrics.csv``: a row for each step, a column for each metric, on rank 0.

    What is logged for one step comes together in one row; a value logged twice is the later one.

    Args:
        folder: where the folders of the runs are; no earlier one is ever written to.
        flush_rows: rows kept in memory before they are written.

    Attributes:
        path: the file of this run, None until the job runs.
    """

    def __init__(self, folder: str | os.PathLike[str] = "runs", *, flush_rows: int = 100) -> None:
        if flush_rows < 1:
            raise SettingError(f"flush_rows={flush_rows!r} does not fit: it is a number of rows from 1.")
        self.folder = Path(folder)
        self.flush_rows = flush_rows
        self.path: Path | None = None
        self._columns = [_STEP]
        self._pending: dict[int, dict[str, float]] = {}
        self._written: set[int] = set()
        self._stale = True

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        if context.world.global_rank == 0:
            self.__init__(self.folder, flush_rows=self.flush_rows)  # type: ignore[misc]
            self.path = new_version(self.folder) / "metrics.csv"

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        if _STEP in metrics:
            raise SettingError(f"log({_STEP!r}): the column {_STEP!r} holds the number of the step; choose another name.")
        self._pending.setdefault(self.next_step(step), {}).update(metrics)
        new = [name for name in metrics if name not in self._columns]
        self._columns += new
        self._stale |= bool(new)
        # The row of this step may still grow.
        if len(self._pending) > self.flush_rows:
            self._flush()
