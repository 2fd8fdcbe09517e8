"""Detect processes killed by the kernel's out-of-memory killer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def out_of_memory_kills() -> int:
    """Return how many processes of this control group the OOM killer has killed; 0 if the kernel does not report it."""
    for counters in _counters():
        try:
            words = counters.read_text(encoding="utf-8").split()
            return int(words[words.index("oom_kill") + 1])
        except (OSError, ValueError):
            continue
    return 0


def _counters() -> Iterator[Path]:
    """Yield the files that may hold the counter: of control groups version 2, then version 1.

    In a container the group's path may be the host's while the group is mounted at the top.
    """
    try:
        groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()]
    except OSError:
        return
    for _, controllers, path in groups:
        top, name = Path("/sys/fs/cgroup"), "memory.events"
        if "memory" in controllers.split(","):
            top, name = top / "memory", "memory.oom_control"
        elif controllers:
            continue
        yield from (top / path.lstrip("/") / name, top / name)
