"""Run the contract suite of plugframe's loggers on offline runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("wandb", reason="wandb is not installed: pip install wandb")

import numpy as np
import offline
from PIL import Image
from plugframe_wandb.logger import STEP

from plugframe.testing import LoggerContract


class TestWandb(LoggerContract):
    spec = "wandb"

    def arguments(self, folder: Path) -> dict[str, Any]:
        return {"folder": str(folder), "mode": "offline"}

    def read(self, logger: Any) -> list[tuple[int, str, float]]:
        """Return the metrics of the history."""
        return [
            (row[STEP], name, float(value))
            for row in _rows(logger)
            for name, value in row.items()
            if isinstance(name, str) and not name.startswith("_") and name != STEP and not isinstance(value, list)
            if not (isinstance(value, str) and value not in ("NaN", "Infinity", "-Infinity"))
        ]

    def read_hyperparams(self, logger: Any) -> dict[str, Any]:
        return offline.config(Path(logger.folder), _run_id(logger))

    def read_artifact(self, logger: Any, name: str, step: int | None, kind: str) -> Any:
        if kind == "file":
            return (logger.path / f"{name}{'' if step is None else f'@{step}'}.bin").read_bytes()
        if kind == "text":
            (row,) = [row for row in _rows(logger) if name in row and step in (None, row.get(STEP))]
            return row[name]
        (row,) = [row for row in _rows(logger) if (name, "path") in row and step in (None, row.get(STEP))]
        path = logger.path / row[name, "path"]
        return np.array(Image.open(path)) if kind == "image" else json.loads(path.read_text())["data"]

    def has_failed(self, logger: Any) -> bool:
        return offline.exit_code(Path(logger.folder), _run_id(logger)) != 0


def _run_id(logger: Any) -> str:
    (file,) = logger.path.parent.glob("run-*.wandb")
    return file.stem.removeprefix("run-")


def _rows(logger: Any) -> list[dict[str, Any]]:
    return list(offline.history(Path(logger.folder), _run_id(logger)))
