"""Wait for processes, and see whether one is there."""

from __future__ import annotations

import time
from pathlib import Path


def wait_for(condition: object) -> None:
    until = time.monotonic() + 60.0
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < until
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
