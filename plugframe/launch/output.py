"""Routing of the ranks' output: to the terminal unmodified, to it with a rank prefix, or to log files."""

from __future__ import annotations

import io
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from plugframe.errors import SettingError, UsageError
from plugframe.hooks.launcher import Job

STREAMS = ("stdout", "stderr")
#: Prefix of a line from a rank's file on the terminal; torch fills in the rank.
PREFIX = "[rank ${rank}] "
_STREAMS_BY_NAME: Mapping[str, tuple[str, ...]] = {
    **{"0": (), "1": STREAMS[:1], "2": STREAMS[1:], "3": STREAMS},
    **{"out": STREAMS[:1], "err": STREAMS[1:], "all": STREAMS},
}


def parse_tee(text: str, num_ranks: int | None = None) -> Mapping[int, Sequence[str]] | Sequence[str]:
    """Parse ``--tee``: return the streams of every rank, or streams by rank (``0:all,3:err``).

    Args:
        text: the value of the option.
        num_ranks: number of ranks of the job, if known.

    Raises:
        SettingError: if the value is invalid, or names a rank that does not exist.
    """
    if text in _STREAMS_BY_NAME:
        return _STREAMS_BY_NAME[text]
    parts = [re.fullmatch(r"(\d+):(\w+)", part) for part in text.split(",")]
    found = {
        int(part[1]): _STREAMS_BY_NAME[part[2]] for part in parts if part is not None and part[2] in _STREAMS_BY_NAME
    }
    if len(found) < len(parts):
        raise SettingError(
            f"--tee={text}: use 1 or out, 2 or err, 3 or all, 0 for none; or a list by rank, with each rank once, "
            "such as --tee=0:all,1:err."
        )
    if num_ranks is not None and max(found) >= num_ranks:
        raise SettingError(f"--tee={text}: no rank {max(found)}, this job has ranks 0 to {num_ranks - 1}.")
    return found


@dataclass(frozen=True)
class Output:
    """Where the output of a job's ranks goes.

    Attributes:
        folder: the folder for log files; None without them.
        tee: the streams that the terminal shows with a rank prefix, for all ranks or by rank.
        terminal_rank: the rank that uses the terminal exclusively, and has no log files.
    """

    folder: Path | None
    tee: Mapping[int, Sequence[str]] | Sequence[str]
    terminal_rank: int | None = None

    @classmethod
    def from_job(cls, job: Job) -> Output:
        """Return the output settings of `job`."""
        by_default = STREAMS if job.log_dir is not None else ()
        return cls(
            folder=Path(os.path.abspath(job.log_dir)) if job.log_dir is not None else None,
            tee=by_default if job.tee is None else job.tee,
            terminal_rank=job.debug_rank,
        )

    def shows(self, rank: int, stream: str) -> bool:
        """Return whether the terminal shows a stream with a rank prefix."""
        streams = self.tee.get(rank, ()) if isinstance(self.tee, Mapping) else self.tee
        return rank != self.terminal_rank and stream in streams

    def file(self, rank: int, stream: str, *, attempt: int, default_folder: Path) -> str:
        """Return the file for a stream; empty if it goes to the terminal.

        Args:
            rank: the global rank.
            stream: one of `STREAMS`.
            attempt: number of the attempt, which selects the folder.
            default_folder: the folder for a file that is not saved.
        """
        if rank == self.terminal_rank:
            return ""
        if self.folder is not None:
            return str(self.attempt_folder(attempt) / file_name(rank, stream))
        return str(default_folder / f"{stream}.log") if self.shows(rank, stream) else ""

    def attempt_folder(self, attempt: int) -> Path:
        """Return the folder for the log files of an attempt."""
        assert self.folder is not None
        return self.folder / f"attempt-{attempt}"

    def create_attempt_folder(self, attempt: int, ranks: Sequence[int]) -> int:
        """Create the folder of an attempt and return its number: the first unused one from `attempt` on.

        Existing files are never overwritten: a restarted job continues the numbering. Other nodes may share the folder,
        so a number is used if it has a file of one of this node's ranks.

        Raises:
            UsageError: if the folder cannot be created.
        """
        if self.folder is None:
            return attempt
        names = [file_name(rank, stream) for rank in ranks for stream in STREAMS]
        while any((self.attempt_folder(attempt) / name).exists() for name in names):
            attempt += 1
        try:
            self.attempt_folder(attempt).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise _unusable(self.folder, error) from None
        return attempt

    @contextmanager
    def line_buffered(self) -> Iterator[None]:
        """Make this process line-buffered, also into a pipe, while it prints lines of ranks."""
        changed = [
            stream
            for stream in (sys.stdout, sys.stderr)
            if self.tee and isinstance(stream, io.TextIOWrapper) and not stream.line_buffering
        ]
        for stream in changed:
            stream.reconfigure(line_buffering=True)
        try:
            yield
        finally:
            for stream in changed:
                stream.reconfigure(line_buffering=False)

    def check(self) -> None:
        """Create the folder and check that it is writable.

        Raises:
            UsageError: if it is not.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise _unusable(self.folder, error) from None


def file_name(rank: int, stream: str) -> str:
    """Return the name of a rank's log file: ``rank-3.stderr.log``."""
    return f"rank-{rank}.{stream}.log"


def _unusable(folder: Path, error: OSError) -> UsageError:
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            problem = "is" if place == folder else f"cannot be created: {place} is"
            return UsageError(f"--log-dir={folder} {problem} a file: use a folder.")
    return UsageError(f"--log-dir={folder} is not writable ({error.strerror or error}): use another folder.")
