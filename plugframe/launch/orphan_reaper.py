"""Kill the remaining processes of a job when its launcher is killed.

The kernel kills the ranks themselves (see `rank.die_with_parent`), but not the processes they have started.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Collection
from typing import IO

# The pipe is closed when the launcher ends, for any reason; the last line lists the ranks' process groups.
_SCRIPT = """
trap '' HUP INT QUIT TERM
while read -r line; do groups=$line; done
for group in $groups; do kill -9 "-$group"; done
rm -rf -- "$1"
"""
_open_pipes: set[IO[bytes]] = set()


class OrphanReaper:
    """Context manager that runs a shell which waits for this process to end and then kills its process groups.

    Without a shell there is no reaper, and the job runs all the same.

    Args:
        folder: the launcher's temporary folder, removed with the job.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._groups: tuple[int, ...] = ()
        self._shell: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> OrphanReaper:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shell is None or self._shell.stdin is None:
            return
        self._shell.kill()
        self._shell.wait()
        _open_pipes.discard(self._shell.stdin)
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.close()

    def set_groups(self, groups: Collection[int]) -> None:
        """Set the process groups to kill when this process ends."""
        if tuple(groups) == self._groups:
            return
        self._groups = tuple(groups)
        with contextlib.suppress(OSError):  # no shell, or it was killed
            pipe = self._pipe()
            pipe.write(" ".join(map(str, self._groups)).encode() + b"\n")
            pipe.flush()

    def _pipe(self) -> IO[bytes]:
        if self._shell is None:
            # In its own session, so that a signal to the launcher's process group (from a terminal) does not reach it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "plugframe-guardian", self._folder],
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self._shell.stdin is not None
        _open_pipes.add(self._shell.stdin)
        return self._shell.stdin


def close_inherited_pipes() -> None:
    """Close reaper pipes inherited from the parent process: they must close when the parent ends."""
    while _open_pipes:
        with contextlib.suppress(OSError):
            _open_pipes.pop().close()
