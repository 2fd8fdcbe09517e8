"""The checkpoints in a folder of ``lite.checkpoints()``, without their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugframe.errors import CheckpointError, SettingError
from plugframe.tools.checkpoint import Reader

_NAME = re.compile(r"step-(\d{12})\.ckpt")


def found_in(folder: Path) -> list[dict[str, Any]]:
    """Return name, step, size in bytes, time and metrics of each checkpoint, the earliest step first.

    Raises:
        SettingError: if there is none.
    """
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    matches = [match for match in map(_NAME.fullmatch, names) if match]
    if not matches:
        raise SettingError(f"--checkpoints={folder} holds no checkpoint of lite.checkpoints(): step-….ckpt.")
    reader = Reader()
    return [_about(folder / match[0], int(match[1]), reader) for match in matches]


def _about(path: Path, step: int, reader: Reader) -> dict[str, Any]:
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    try:
        metrics = reader.info(str(path)).get("metrics")
    except CheckpointError:
        metrics = None  # one that is damaged, or being written
    return {
        "name": path.name,
        "step": step,
        "size_bytes": sum(file.stat().st_size for file in files),
        "time": max((file.stat().st_mtime for file in files), default=0.0),
        "metrics": dict(metrics) if isinstance(metrics, Mapping) else {},
    }
