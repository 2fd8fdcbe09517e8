"""What outlives a launcher that is killed: it ends what is left of the job.

The system ends the ranks themselves then, but not the processes that they have started.
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Collection
from typing import IO

# The pipe ends with the launcher, however that one ends; the last line names the ranks' process groups.
_SCRIPT = """
trap '' HUP INT QUIT TERM
while read -r line; do groups=$line; done
for group in $groups; do kill -9 "-$group"; done
rm -rf -- "$1"
"""
_held: set[IO[bytes]] = set()


class Guardian:
    """A shell that waits for the end of this process, for as long as it is entered.

    Where there is no shell nobody waits: the job runs all the same.

    Args:
        folder: the launcher's temporary folder, which goes with the job.
    """

    def __init__(self, folder: str) -> None:
        self._folder = folder
        self._groups: tuple[int, ...] = ()
        self._shell: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Guardian:
        return self

    def __exit__(self, *_: object) -> None:
        if self._shell is None or self._shell.stdin is None:
            return
        self._shell.kill()
        self._shell.wait()
        _held.discard(self._shell.stdin)
        with contextlib.suppress(BrokenPipeError):
            self._shell.stdin.close()

    def guard(self, groups: Collection[int]) -> None:
        """Note the process groups that are to end with this process, in place of those noted before."""
        if tuple(groups) == self._groups:
            return
        self._groups = tuple(groups)
        with contextlib.suppress(OSError):  # no shell, or somebody has ended it
            pipe = self._pipe()
            pipe.write(" ".join(map(str, self._groups)).encode() + b"\n")
            pipe.flush()

    def _pipe(self) -> IO[bytes]:
        if self._shell is None:
            # In a session of its own: what ends the launcher's whole group, a terminal say, is not for it.
            self._shell = subprocess.Popen(
                ["/bin/sh", "-c", _SCRIPT, "plugframe-guardian", self._folder],
                cwd="/",
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        assert self._shell.stdin is not None
        _held.add(self._shell.stdin)
        return self._shell.stdin


def let_go() -> None:
    """Close the pipes of guardians that this process has from its parent: they are to end with that one."""
    while _held:
        with contextlib.suppress(OSError):
            _held.pop().close()
