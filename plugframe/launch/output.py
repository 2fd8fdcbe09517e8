"""Where the output of each rank goes: to the terminal as it is, there with the rank before each line, or to a file."""

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
#: What stands before a line that the terminal shows of a rank's file; torch fills in the rank.
PREFIX = "[rank ${rank}] "
_WORDS: Mapping[str, tuple[str, ...]] = {
    **{"0": (), "1": STREAMS[:1], "2": STREAMS[1:], "3": STREAMS},
    **{"out": STREAMS[:1], "err": STREAMS[1:], "all": STREAMS},
}


def parse_tee(text: str, num_ranks: int | None = None) -> Mapping[int, Sequence[str]] | Sequence[str]:
    """Return what ``--tee`` means: the streams of every rank, or by rank (``0:all,3:err``).

    Args:
        text: what was typed.
        num_ranks: of the job, where that is known.

    Raises:
        SettingError: if it means nothing, or names a rank that is not there.
    """
    if text in _WORDS:
        return _WORDS[text]
    parts = [re.fullmatch(r"(\d+):(\w+)", part) for part in text.split(",")]
    found = {int(part[1]): _WORDS[part[2]] for part in parts if part is not None and part[2] in _WORDS}
    if len(found) < len(parts):
        raise SettingError(
            f"--tee={text}: type 1 or out, 2 or err, 3 or all, 0 for neither; of some ranks alone, each of them once, "
            "--tee=0:all,1:err."
        )
    if num_ranks is not None and max(found) >= num_ranks:
        raise SettingError(f"--tee={text}: there is no rank {max(found)}, ranks go from 0 to {num_ranks - 1} here.")
    return found


@dataclass(frozen=True)
class Output:
    """What becomes of the output of a job's ranks.

    Attributes:
        folder: where the files are that are kept; None if none are.
        tee: the streams that the terminal shows line by line, of all ranks or by rank.
        at_terminal: the rank that has the terminal to itself, and no files.
    """

    folder: Path | None
    tee: Mapping[int, Sequence[str]] | Sequence[str]
    at_terminal: int | None = None

    @classmethod
    def of(cls, job: Job) -> Output:
        """Return what `job` asks for."""
        by_default = STREAMS if job.log_dir is not None else ()
        return cls(
            folder=Path(os.path.abspath(job.log_dir)) if job.log_dir is not None else None,
            tee=by_default if job.tee is None else job.tee,
            at_terminal=job.debug_rank,
        )

    def shows(self, rank: int, stream: str) -> bool:
        """Say whether the terminal shows a stream line by line, with the rank."""
        streams = self.tee.get(rank, ()) if isinstance(self.tee, Mapping) else self.tee
        return rank != self.at_terminal and stream in streams

    def file(self, rank: int, stream: str, *, attempt: int, otherwise: Path) -> str:
        """Return the file that a stream goes to, empty if it goes to the terminal.

        Args:
            rank: global.
            stream: one of `STREAMS`.
            attempt: whose folder it is in.
            otherwise: the folder for a file that is not kept.
        """
        if rank == self.at_terminal:
            return ""
        if self.folder is not None:
            return str(self.attempt_folder(attempt) / file_name(rank, stream))
        return str(otherwise / f"{stream}.log") if self.shows(rank, stream) else ""

    def attempt_folder(self, attempt: int) -> Path:
        """Return where the files of an attempt are."""
        assert self.folder is not None
        return self.folder / f"attempt-{attempt}"

    def begin(self, attempt: int, ranks: Sequence[int]) -> int:
        """Make the folder of an attempt, and return its number: from `attempt` on the first that is free.

        Nothing is written over: a job that is started again over the same folder goes on counting. Other nodes may
        share it, so that a number is taken once there is a file of one of this node's ranks.

        Raises:
            UsageError: if the folder cannot be made.
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
    def flowing(self) -> Iterator[None]:
        """Have this process print whole lines at once, also into a pipe, while it prints those of ranks."""
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
        """Make the folder, and see whether files can be made in it.

        Raises:
            UsageError: if that is not so.
        """
        if self.folder is None:
            return
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.folder).close()
        except OSError as error:
            raise _unusable(self.folder, error) from None


def file_name(rank: int, stream: str) -> str:
    """Return the name of a rank's file: ``rank-3.stderr.log``."""
    return f"rank-{rank}.{stream}.log"


def _unusable(folder: Path, error: OSError) -> UsageError:
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            what = "is" if place == folder else f"cannot be made: {place} is"
            return UsageError(f"--log-dir={folder} {what} a file: name a folder.")
    return UsageError(f"--log-dir={folder} cannot be written to ({error.strerror or error}): name another folder.")
