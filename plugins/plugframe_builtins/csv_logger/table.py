"""A CSV file with a row per step, to which rows and columns can be added."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

STEP = "step"


class Table:
    """Rows by step, buffered until `flush`; the rows of an existing file are kept.

    Rows are appended. Only for a new column, or for more values of a step that is in the file
    already, is the file rewritten, atomically.

    Attributes:
        pending: rows not in the file yet, or values to merge into rows that are.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.pending: dict[int, dict[str, float]] = {}
        self._columns = [STEP]
        self._written: set[int] = set()
        self._in_file: list[str] = []
        if path.exists():
            self._open()

    def _open(self) -> None:
        """Continue the file of an earlier job, which may have died while it wrote a row."""
        content = self.path.read_bytes()
        if not content.endswith(b"\n"):
            beside = self._beside()
            beside.write_bytes(content[: content.rfind(b"\n") + 1])
            os.replace(beside, self.path)
        with open(self.path, newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            self._in_file = list(reader.fieldnames or ())
            self._columns = list(self._in_file) or [STEP]
            self._written = {int(row[STEP]) for row in reader}

    def _beside(self) -> Path:
        return self.path.with_name(f"{self.path.name}.part")

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add values to the row of a step."""
        self.pending.setdefault(step, {}).update(values)
        self._columns += [name for name in values if name not in self._columns]

    def flush(self, *, but: int | None = None) -> None:
        """Write all pending rows, except that of the step `but`."""
        kept = {step: values for step, values in self.pending.items() if step == but}
        rows = {step: values for step, values in self.pending.items() if step != but}
        if not rows:
            return
        if self._in_file == self._columns and self._written.isdisjoint(rows):
            self._write(self.path, "a", _as_rows(rows))
        else:
            beside = self._beside()
            self._write(beside, "w", self._merged(dict(rows)))
            os.replace(beside, self.path)
        self._written |= rows.keys()
        self._in_file = list(self._columns)
        self.pending = kept

    def _write(self, path: Path, mode: str, rows: Iterator[dict[str, Any]]) -> None:
        with open(path, mode, newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, self._columns)
            if mode == "w":
                writer.writeheader()
            writer.writerows(rows)

    def _merged(self, rows: dict[int, dict[str, float]]) -> Iterator[dict[str, Any]]:
        """Yield the file's rows merged with pending values, then the new rows."""
        if self._written:
            with open(self.path, newline="", encoding="utf-8") as file:
                for row in csv.DictReader(file):
                    yield {**row, **rows.pop(int(row[STEP]), {})}
        yield from _as_rows(rows)


def _as_rows(rows: Mapping[int, Mapping[str, float]]) -> Iterator[dict[str, Any]]:
    return ({STEP: step, **values} for step, values in rows.items())
