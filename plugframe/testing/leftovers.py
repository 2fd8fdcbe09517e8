"""Detect leftovers of tests and plugins: processes, sockets, files, variables and global state."""

from __future__ import annotations

import gc
import os
import signal
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

#: Helper processes of Python's multiprocessing, which outlive a test by design and end with the session.
_STANDING = ("forkserver", "resource_tracker")

#: Folders of pytest, and of torch's compiler cache, created on first use.
_KEPT = ("pytest-of-", "torchinductor_")

#: Set by test runners, and by torch on first use.
_OTHERS_VARIABLES = ("PYTEST_CURRENT_TEST", "KINETO_LOG_LEVEL", "TORCHINDUCTOR_CACHE_DIR")


def of_tests() -> dict[str, Any]:
    """Return the state of the machine and the process that a test could change for later tests."""
    return {
        **_common(),
        "sockets": _sockets(),
        "temporary files": {n for n in os.listdir(tempfile.gettempdir()) if not n.startswith(_KEPT)},
    }


def traces(*, collect: bool = True) -> dict[str, Any]:
    """Return the state of this process that a plugin could change.

    Args:
        collect: have what refers to itself go first, which takes some time where torch is loaded.
    """
    if collect:
        gc.collect()
    import torch

    return {
        **_common(),
        "signal handlers": {number: signal.getsignal(number) for number in sorted(signal.valid_signals())},
        "threads": {thread.name for thread in threading.enumerate() if thread.is_alive()},
        "whether gradients are recorded": torch.is_grad_enabled(),
        "a trace or profile function": (sys.gettrace(), sys.getprofile()),
        "sys.excepthook": sys.excepthook,
    }


def left(before: dict[str, Any], after: dict[str, Any]) -> str:
    """Describe what was added or changed between `before` and `after`; empty if nothing."""
    for what, value in after.items():
        was = before[what]
        if what == "sockets":
            if ports := _listening(value - was):
                return f"listening ports are left: {', '.join(sorted(ports))}"
        elif isinstance(value, set):
            if value - was:
                return f"{what} are left: {', '.join(sorted(map(str, value - was)))}"
        elif isinstance(value, dict):
            changed = sorted(str(key) for key in {**was, **value} if was.get(key) != value.get(key))
            if changed:
                return f"{what} have changed: {', '.join(changed)}"
        elif value != was:
            return f"{what} has changed: {was!r} before, {value!r} after"
    return ""


def _common() -> dict[str, Any]:
    found: dict[str, Any] = {
        "processes": children(),
        "environment variables": {k: v for k, v in os.environ.items() if k not in _OTHERS_VARIABLES},
        "the working folder": os.getcwd(),
    }
    if "torch" in sys.modules:
        import torch

        initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
        found |= {"the default dtype": torch.get_default_dtype(), "a process group": initialized}
    return found


def children() -> set[str]:
    """Return this process's children, where the system lists them, without multiprocessing's helpers."""
    if not _has_children():
        return set()
    found = set()
    for thread in Path("/proc/self/task").glob("*/children"):
        for pid in _text(thread).split():
            command = _text(Path(f"/proc/{pid}/cmdline")).replace("\0", " ")
            if command and not any(name in command for name in _STANDING):
                found.add(f"process {pid} ({command[:80].strip()})")
    return found


def _has_children() -> bool:
    """Return whether there is any child: one system call, and not a dozen files."""
    if not hasattr(os, "waitid"):
        return True
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WSTOPPED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""  # the thread or process has ended meanwhile


def _sockets() -> set[str]:
    """Return the inodes of this process's open sockets."""
    return {link.rpartition("[")[2].rstrip("]") for link in _links() if link.startswith("socket:")}


def _listening(inodes: set[str]) -> set[str]:
    """Return the addresses of listening sockets. The system's tables are long: read them for new sockets only."""
    found: set[str] = set()
    if not inodes:
        return found
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        for line in _text(Path(table)).splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


def _links() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the descriptor of the listing itself
    return links
