"""The launcher's temporary folder, which it removes at the end; one that was killed leaves it to the next."""

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
#: How old a folder without a lock must be: its launcher may be about to take it.
_YOUNG_S = 60.0


@contextmanager
def temporary_folder() -> Iterator[str]:
    """Give a new folder, and remove it at the end, together with those of launchers that were killed."""
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
    """Remove the folders of launchers of this user that have died without cleaning up."""
    for folder in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*"):
        with suppress(OSError):  # of another user, or removed by another launcher at this moment
            if folder.stat().st_uid != os.getuid():
                continue
            # A lock ends with its process, on whatever terms, and holds across containers, where ids do not.
            lock = _lock(folder / _LOCK, create=False)
            if lock is not None:
                os.close(lock)
            elif (folder / _LOCK).exists() or time.time() - folder.stat().st_mtime < _YOUNG_S:
                continue
            shutil.rmtree(folder, ignore_errors=True)


def _lock(path: Path, *, create: bool) -> int | None:
    """Return a descriptor that holds the file's lock, None if another process holds it or there is no such file."""
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
