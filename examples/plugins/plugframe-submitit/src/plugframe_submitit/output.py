"""The output of a job as it comes."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

#: How submitit's own lines begin.
_NOTES = b"submitit INFO"


class Follower:
    """Passes on what is added to files: a line at a time, without submitit's own notes."""

    def __init__(self, job: Any) -> None:
        tasks = [job.task(number) for number in range(job.num_tasks)]
        self._files: list[_File] = []
        for task in tasks:
            self._files += [_File(task.paths.stdout, sys.stdout), _File(task.paths.stderr, sys.stderr)]

    def look(self, *, last: bool = False) -> None:
        """Pass on what is new; at the `last` look also a line without an end."""
        for file in self._files:
            file.look(last)


class _File:
    def __init__(self, path: Path, target: TextIO) -> None:
        self._path, self._target = path, target
        self._position, self._rest = 0, b""

    def look(self, last: bool) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._rest = (self._rest + data).split(b"\n")
        if last and self._rest:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            if not line.startswith(_NOTES):
                print(line.decode(errors="replace"), file=self._target, flush=True)
