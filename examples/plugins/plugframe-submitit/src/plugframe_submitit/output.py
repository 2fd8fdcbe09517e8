"""Live output of a job."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, TextIO

#: Prefix of submitit's own log lines.
_LOG_PREFIX = b"submitit INFO"


class OutputForwarder:
    """Forward new lines of a job's output files, without submitit's own log lines."""

    def __init__(self, job: Any) -> None:
        tasks = [job.task(number) for number in range(job.num_tasks)]
        self._files: list[_OutputFile] = []
        for task in tasks:
            self._files += [_OutputFile(task.paths.stdout, sys.stdout), _OutputFile(task.paths.stderr, sys.stderr)]

    def forward(self, *, last: bool = False) -> None:
        """Forward new lines; with `last`, also an unterminated one."""
        for file in self._files:
            file.forward(last)


class _OutputFile:
    def __init__(self, path: Path, target: TextIO) -> None:
        self._path, self._target = path, target
        self._position, self._partial_line = 0, b""

    def forward(self, last: bool) -> None:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._position)
            data = file.read()
        self._position += len(data)
        *lines, self._partial_line = (self._partial_line + data).split(b"\n")
        if last and self._partial_line:
            lines, self._partial_line = [*lines, self._partial_line], b""
        for line in lines:
            if not line.startswith(_LOG_PREFIX):
                print(line.decode(errors="replace"), file=self._target, flush=True)
