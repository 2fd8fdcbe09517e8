"""The open files of one checkpoint."""

from __future__ import annotations

import os
import weakref
from collections.abc import Iterable

from plugframe.errors import CheckpointCorruptError
from plugframe_builtins._shared.checkpoint_files.regular_file import open_regular

#: Processes are commonly limited to 1024 open files.
_MAX_OPEN = 200


class Files:
    """Read files by name; thread-safe.

    An open file keeps its content even if it is replaced on disk meanwhile.
    """

    def __init__(self, path: str, names: Iterable[str]) -> None:
        self.path = path
        self._keep = len(list(names)) <= _MAX_OPEN
        self._open: dict[str, int] = {}
        self.close = weakref.finalize(self, _close, self._open)

    def name(self, file: str) -> str:
        """Return a file's path."""
        return os.path.join(self.path, file) if file else self.path

    def adopt(self, file: str, descriptor: int) -> None:
        """Read `file` through a duplicate of an open descriptor."""
        self._open[file] = os.dup(descriptor)

    def size(self, file: str) -> int | None:
        """Return a file's size in bytes, or None if it does not exist."""
        if file in self._open:
            return os.fstat(self._open[file]).st_size
        try:
            with open_regular(self.name(file)) as opened:
                return os.fstat(opened.fileno()).st_size
        except FileNotFoundError:
            return None

    def read_into(self, buffer: memoryview, file: str, start: int, what: str) -> None:
        """Fill `buffer` with the bytes of `file` from `start` on.

        Raises:
            CheckpointCorruptError: if the file is too short; names the file and `what` is missing.
        """
        descriptor = self._descriptor(file)
        done = 0
        try:
            while done < len(buffer):
                count = os.preadv(descriptor, [buffer[done:]], start + done)
                if count == 0:
                    raise CheckpointCorruptError(
                        f"{self.name(file)} is truncated: {what} has {len(buffer)} bytes, found {done}."
                    )
                done += count
        finally:
            if not self._keep:
                os.close(descriptor)

    def _descriptor(self, file: str) -> int:
        if file in self._open:
            return self._open[file]
        try:
            with open_regular(self.name(file)) as opened:
                descriptor = os.dup(opened.fileno())
        except FileNotFoundError:
            raise CheckpointCorruptError(f"{self.path} is incomplete: the file {file} is missing.") from None
        if not self._keep:
            return descriptor
        kept = self._open.setdefault(file, descriptor)
        if kept != descriptor:  # another thread was quicker
            os.close(descriptor)
        return kept


def _close(descriptors: dict[str, int]) -> None:
    while descriptors:
        os.close(descriptors.popitem()[1])
