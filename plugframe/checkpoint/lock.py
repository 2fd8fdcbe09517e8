"""One process at a time saves into a folder: a lock that the kernel drops with its owner."""

from __future__ import annotations

import errno
import fcntl
import os
import weakref
from contextlib import suppress

#: The name of the lock file, where a folder itself cannot be locked.
LOCK_FILE = ".plugframe-lock"


class FolderLock:
    """Hold a folder for this process.

    The folder itself is locked with ``flock``, so nothing is left in it. Network file systems lock only files that
    are open for writing: there a file `LOCK_FILE` in the folder is locked instead, and stays. Where there are no
    locks at all the folder counts as held. The processes of one job need one lock: a second one of this process
    shares it.
    """

    def __init__(self, folder: str) -> None:
        self.folder = os.path.abspath(folder)
        self._held: _Held | None = None

    def take(self) -> bool:
        """Hold the folder, which must exist; say whether it is held now. False: another process holds it.

        Raises:
            OSError: if it cannot be opened.
        """
        key = _key(self.folder)
        if self._held is not None and self._held.key == key and self._held.descriptor is not None:
            return True
        self._held = _HELD.get(key)
        if self._held is None:
            descriptor = _lock(self.folder)
            if descriptor == _TAKEN:
                return False
            self._held = _Held(key, descriptor)
            _HELD[key] = self._held
        return True

    def release(self) -> None:
        """Let go of the folder, unless another lock of this process holds it as well."""
        self._held = None

    def owner(self) -> str:
        """Return who else holds the folder, as far as this system tells: ``"process 1234"``."""
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


class _Held:
    """An open descriptor that carries the lock; None where there are no locks."""

    def __init__(self, key: tuple[int, int], descriptor: int | None) -> None:
        self.key = key
        self.descriptor: int | None = -1 if descriptor is None else descriptor
        self.close = weakref.finalize(self, _close, self.descriptor, os.getpid())


#: What this process holds: a lock is the process's by its nature, whichever object asked for it first.
_HELD: weakref.WeakValueDictionary[tuple[int, int], _Held] = weakref.WeakValueDictionary()
_TAKEN = -2


def _key(path: str) -> tuple[int, int]:
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _lock(folder: str) -> int | None:
    """Return a descriptor that holds the lock, None where there are none, or `_TAKEN`."""
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
    # A copy that was forked has let go of its own already.
    if descriptor is not None and descriptor >= 0 and os.getpid() == process:
        os.close(descriptor)


def _let_go_in_child() -> None:
    """Close what was inherited: a loader's worker that outlives its rank must not hold the rank's folder."""
    for held in list(_HELD.values()):
        if held.descriptor is not None and held.descriptor >= 0:
            with suppress(OSError):
                os.close(held.descriptor)
        held.descriptor = None
    _HELD.clear()


os.register_at_fork(after_in_child=_let_go_in_child)
