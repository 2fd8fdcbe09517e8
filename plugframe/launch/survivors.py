"""What ranks that have ended well leave running: copies of themselves are ended, and everything left is reported."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from plugframe.launch import rank as rank_script
from plugframe.launch.monitor import Rank

#: How long processes may take to notice that their rank has gone, as helpers of multiprocessing do.
_LEAVE_S = 1.0
_LOOK_S = 0.05
_MAX_COMMAND = 60
#: Helpers of multiprocessing that end by themselves, and have something to clear away before they do.
_STANDING = ("resource_tracker", "forkserver")


@dataclass(frozen=True)
class Survivor:
    """A process in the group of a rank that has ended.

    Attributes:
        pid: its process id.
        rank: the global rank.
        command: what it runs, for people.
        copy: whether it runs the rank's own code: forked from it, or started by multiprocessing.
    """

    pid: int
    rank: int
    command: str
    copy: bool

    @property
    def text(self) -> str:
        """The beginning of what is said of it; what becomes of it and a parenthesis follow."""
        return f"process {self.pid} of rank {self.rank} ({self.command}"


class Survivors:
    """Looks after what ranks that have ended well leave running.

    Copies of a rank are of no use without it, and are ended. A program that it has started, a server or an upload, goes
    on: it may be meant to. What has a group of its own (``start_new_session=True``) is not looked for.
    """

    def __init__(self) -> None:
        self._ended: dict[int, Survivor] = {}

    def tell(self, ranks: Collection[Rank]) -> None:
        """End the copies of all ranks, and say in one line what they have left, unless it is nothing."""
        others = self._end_copies(ranks)
        told = [f"{each.text}; ended now)" for each in self._ended.values()]
        told += [f"{each.text}; it goes on)" for each in others]
        if told:
            print(f"plugframe: left running by ranks that have ended: {', '.join(told)}", file=sys.stderr, flush=True)

    def end_copies(self, rank: Rank) -> None:
        """End the copies of one rank, to be reported later."""
        self._end_copies([rank])

    def _end_copies(self, ranks: Collection[Rank]) -> list[Survivor]:
        until = time.monotonic() + _LEAVE_S
        while (found := list(_survivors(ranks))) and time.monotonic() < until:
            time.sleep(_LOOK_S)
        for survivor in found:
            if survivor.copy:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(survivor.pid, signal.SIGKILL)
                self._ended[survivor.pid] = survivor
        return [survivor for survivor in found if not survivor.copy]


def _survivors(ranks: Collection[Rank]) -> Iterator[Survivor]:
    if sys.platform != "linux":
        return
    groups = {rank.pid: rank.global_rank for rank in ranks}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile, or is another user's
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            group = int(fields[2])
            if group not in groups or fields[0] in "ZX":
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(name in word for name in _STANDING for word in words):
                continue
            yield Survivor(int(folder.name), groups[group], _shown(words), _is_copy(words))


def _is_copy(words: list[str]) -> bool:
    own = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    helper = any("multiprocessing" in word for word in words)
    return words == own or helper or os.path.abspath(rank_script.__file__) in words


def _shown(words: list[str]) -> str:
    text = " ".join(filter(None, words))
    text = "".join(letter if letter.isprintable() else "?" for letter in text)
    return text if len(text) <= _MAX_COMMAND else f"{text[: _MAX_COMMAND - 1]}…"
