"""Open untrusted paths safely: no pipes, no devices, no sparse files larger than the disk."""

from __future__ import annotations

import errno
import os
import stat
from typing import BinaryIO

from plugframe.errors import CheckpointCorruptError, CheckpointError


def open_regular(path: str) -> BinaryIO:
    """Open a regular file for reading.

    Raises:
        OSError: as `open` does.
        CheckpointError: if it is not a regular file.
        CheckpointCorruptError: if it is larger than its file system.
    """
    # Checked before opening too: opening a device can have side effects.
    if stat.S_ISREG(os.stat(path).st_mode):
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            file = os.fdopen(descriptor, "rb")
            try:
                check_length(file.fileno(), path)
            except BaseException:
                file.close()
                raise
            return file
        os.close(descriptor)
    elif os.path.isdir(path):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), path)
    raise CheckpointError(f"{path} is not a regular file.")


def check_length(descriptor: int, path: str) -> None:
    """Raise if a file is larger than its file system: it is mostly holes.

    Raises:
        CheckpointCorruptError: with both sizes.
    """
    size = os.fstat(descriptor).st_size
    room = os.fstatvfs(descriptor)
    capacity = room.f_blocks * room.f_frsize
    if 0 < capacity < size:
        raise CheckpointCorruptError(
            f"{path} is not what was written: it claims {size} bytes, and the file system it lies on has {capacity}."
        )
