"""Lock a folder for one process; the kernel releases the lock when the process ends."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from contextlib import suppress

#: The name of the lock file, where a folder itself cannot be locked.
LOCK_FILE = ".plugframe-lock"


class FolderLock:
    """A lock on a folder, held by this process.

    The folder itself is locked with ``flock``, so no file is created. Network file systems lock only files open for
    writing: there a file `LOCK_FILE` in the folder is locked instead, and remains. If locks are not supported,
    acquiring always succeeds. Locks of one process on the same folder share one ``flock``.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        self._held: _Descriptor | None = None

    def take(self) -> bool:
        """Lock the folder, which must exist; return False if another process has locked it.

        Raises:
            OSError: if it cannot be opened.
        """
        key = _key(self.folder)
        if self._held is not None and self._held.key == key and self._held.descriptor is not None:
            return True
        self._held = _LOCKS.get(key)
        if self._held is None:
            descriptor = _lock(self.folder)
            if descriptor == _TAKEN:
                return False
            self._held = _Descriptor(key, descriptor)
            _LOCKS[key] = self._held
        return True

    def release(self) -> None:
        """Release the folder, unless another lock of this process holds it too."""
        self._held = None

    def owner(self) -> str:
        """Return the process that holds the folder, such as ``"process 1234"``, if the system reports it."""
        with suppress(OSError, ValueError):
            keys = {_key(self.folder)}
            with suppress(OSError):
                keys.add(_key(os.path.join(self.folder, LOCK_FILE)))
            with open("/proc/locks", encoding="ascii") as file:
                for line in file:
                    words = line.split()
                    if len(words) > 5 and words[1] == "FLOCK" and words[3] == "WRITE":
                        major, minor, inode = words[5].split(":")
                        if (os.makedev(int(major, 16), int(minor, 16)), int(inode)) in keys:
                            return f"process {words[4]}"
        return "another process"


class _Descriptor:
    """An open file descriptor that holds the lock; -1 where locks are not supported, None in a forked child."""

    def __init__(self, key: tuple[int, int], descriptor: int | None) -> None:
        self.key = key
        self.descriptor: int | None = -1 if descriptor is None else descriptor
        self.close = weakref.finalize(self, _close, self.descriptor, os.getpid())


#: The locks of this process. At module level, since ``flock`` locks belong to the process, not to a `FolderLock`.
_LOCKS: weakref.WeakValueDictionary[tuple[int, int], _Descriptor] = weakref.WeakValueDictionary()
_TAKEN = -2


def _key(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _lock(folder: str) -> int | None:
    """Return a descriptor that holds the lock, None where locks are not supported, or `_TAKEN`."""
    for path, flags in (
        (folder, os.O_RDONLY | os.O_DIRECTORY),
        (os.path.join(folder, LOCK_FILE), os.O_RDWR | os.O_CREAT),
    ):
        descriptor = os.open(path, flags | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                return _TAKEN
            continue
        return descriptor
    return None


def _close(descriptor: int | None, process: int) -> None:
    # A forked child has closed its descriptor already.
    if descriptor is not None and descriptor >= 0 and os.getpid() == process:
        os.close(descriptor)


def _close_in_child() -> None:
    """Close inherited descriptors: a loader's worker that outlives its rank must not hold the rank's lock."""
    for lock in list(_LOCKS.values()):
        if lock.descriptor is not None and lock.descriptor >= 0:
            with suppress(OSError):
                os.close(lock.descriptor)
        lock.descriptor = None
    _LOCKS.clear()


os.register_at_fork(after_in_child=_close_in_child)
