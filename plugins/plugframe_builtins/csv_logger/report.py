"""Runs in the folders of this logger, for ``plugframe report``."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

METRICS, RUN, HYPERPARAMS = "metrics.csv", "run.json", "hparams.json"


def read_runs(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the run in a folder, or those in its folders; of a run that is being recorded, what is written.

    Raises:
        ValueError: if a file cannot be read.
    """
    if path.name == METRICS and path.is_file():
        path = path.parent
    files = [path / METRICS] if (path / METRICS).is_file() else sorted(path.glob(f"*/{METRICS}"), key=_natural)
    for file in files:
        folder = file.parent
        about, params = _json(folder / RUN), _json(folder / HYPERPARAMS)
        try:
            metrics = _metrics(file)
        except (OSError, ValueError, csv.Error) as error:
            raise ValueError(f"{file} cannot be read: {error}.") from None
        yield {
            "path": folder,
            "status": str(about.get("status") or ""),
            "error": str(about.get("error") or ""),
            "jobs": [job for job in about.get("jobs") or [] if isinstance(job, dict)],
            "hyperparams": params,
            "metrics": metrics,
        }


def _natural(file: Path) -> tuple[str, int]:
    head, _, number = file.parent.name.rpartition("_")
    return (head, int(number)) if number.isdigit() else (file.parent.name, -1)


def _metrics(path: Path) -> dict[str, tuple[list[int], list[float]]]:
    """Return steps and values by name, by rising steps: a run that is resumed goes back."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None and "step" not in reader.fieldnames:
            raise ValueError("it has no column 'step'")
        # A row that is being written is shorter.
        rows = sorted(((int(row["step"]), row) for row in reader if None not in row.values()), key=lambda pair: pair[0])
    found: dict[str, tuple[list[int], list[float]]] = {}
    for step, row in rows:
        for name, text in row.items():
            if name not in ("step", None) and text:
                steps, values = found.setdefault(name, ([], []))
                steps.append(step)
                values.append(float(text))
    return found


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # absent, or just being written
    return found if isinstance(found, dict) else {}
