"""The launcher's temporary folder, removed at exit; folders of killed launchers are removed by the next one."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_PREFIX = "plugframe-launch-"
_LOCK = "lock"
#: Minimum age of a folder without a lock before it is removed: its launcher may be about to take the lock.
_MIN_AGE_S = 60.0


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Yield a new folder; remove it at the end, and those of killed launchers."""
    folder = tempfile.mkdtemp(prefix=_PREFIX)
    lock = _lock(Path(folder, _LOCK), create=True)
    try:
        sweep()
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if lock is not None:
            os.close(lock)


def sweep() -> None:
    """Remove the folders of this user's launchers that ended without cleaning up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # another user's, or just removed by another launcher
            if folder.stat().st_uid != os.getuid():
                continue
            # A lock always ends with its process and works across containers, where process ids do not.
            lock = _lock(folder / _LOCK, create=False)
            if lock is not None:
                os.close(lock)
            elif (folder / _LOCK).exists() or time.time() - folder.stat().st_mtime < _MIN_AGE_S:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _lock(path: Path, *, create: bool) -> int | None:
    """Return a descriptor that holds the file's lock; None if another process holds it or the file does not exist."""
    import fcntl

    try:
        descriptor = os.open(path, os.O_RDWR | (os.O_CREAT if create else 0), 0o600)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor
