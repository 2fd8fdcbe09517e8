"""A new folder for every run."""

from __future__ import annotations

import re
from pathlib import Path


def new_version(folder: Path) -> Path:
    """Create and return ``version_N`` in `folder`, with N one above the highest existing number, or 0."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        taken = (re.fullmatch(r"version_(\d+)", path.name) for path in folder.iterdir())
        number = max((int(match.group(1)) for match in taken if match), default=-1) + 1
        path = folder / f"version_{number}"
        try:
            path.mkdir()
        except FileExistsError:
            continue  # another run was faster
        return path
