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

#: Helper processes of Python's own multiprocessing, which outlive a test by design and end with the session.
_STANDING = ("forkserver", "resource_tracker")

#: Folders of pytest, and of torch itself, which makes its compiler's cache on first use.
_KEPT = ("pytest-of-", "torchinductor_")

#: Set by whatever runs the tests, and by torch when it is first used.
_OTHERS_VARIABLES = ("PYTEST_CURRENT_TEST", "KINETO_LOG_LEVEL", "TORCHINDUCTOR_CACHE_DIR")


def of_tests() -> dict[str, Any]:
    """Return what a test could leave on this machine, and what it could change for the tests that follow."""
    return {
        **_common(),
        "sockets": _sockets(),
        "temporary files": {n for n in os.listdir(tempfile.gettempdir()) if not n.startswith(_KEPT)},
    }


def traces(*, collect: bool = True) -> dict[str, Any]:
    """Return what a plugin could leave behind in this process.

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
    """Say what `after` has that `before` had not, an empty string if it is nothing."""
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
                return f"{what} are not as they were: {', '.join(changed)}"
        elif value != was:
            return f"{what} is not as it was: {was!r} before, {value!r} after"
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
    """Return this process's children, where the system lists them; helpers of multiprocessing apart."""
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
    """Say whether there is any child at all, which costs a system call instead of a dozen files."""
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
        return ""  # the thread or process it is about ended meanwhile


def _sockets() -> set[str]:
    """Return the inodes of this process's open sockets."""
    return {link.rpartition("[")[2].rstrip("]") for link in _links() if link.startswith("socket:")}


def _listening(inodes: set[str]) -> set[str]:
    """Return the addresses that sockets listen at. The system's tables are long: they are read for new sockets only."""
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
