"""Kill copies of ranks that outlive them, and report all processes that finished ranks leave behind."""

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

#: Time for processes to notice that their rank has exited, as helpers of multiprocessing do.
_EXIT_TIMEOUT_S = 1.0
_POLL_S = 0.05
_MAX_COMMAND_CHARS = 60
#: Helpers of multiprocessing that exit by themselves after they have cleaned up.
_HELPERS = ("resource_tracker", "forkserver")


@dataclass(frozen=True)
class Survivor:
    """A process in the process group of a rank that has exited.

    Attributes:
        pid: its process id.
        rank: the global rank.
        command: its command line, shortened, for messages.
        copy: whether it runs the rank's own code: forked from it, or started by multiprocessing.
    """

    pid: int
    rank: int
    command: str
    copy: bool

    @property
    def text(self) -> str:
        """Beginning of the message about it; its fate and a closing parenthesis follow."""
        return f"process {self.pid} of rank {self.rank} ({self.command}"


class Survivors:
    """Handles processes that finished ranks leave running.

    Copies of a rank are killed. Programs that a rank has started (a server, an upload) continue, because they may be
    intended to. Processes in their own group (``start_new_session=True``) are ignored.
    """

    def __init__(self) -> None:
        self._killed: dict[int, Survivor] = {}

    def report(self, ranks: Collection[Rank]) -> None:
        """Kill the copies of all ranks, and print one line if processes are left."""
        others = self._kill_copies(ranks)
        processes = [f"{each.text}; killed)" for each in self._killed.values()]
        processes += [f"{each.text}; still running)" for each in others]
        if processes:
            text = f"plugframe: left running by ranks that have exited: {', '.join(processes)}"
            print(text, file=sys.stderr, flush=True)

    def kill_copies(self, rank: Rank) -> None:
        """Kill the copies of one rank; `report` lists them."""
        self._kill_copies([rank])

    def _kill_copies(self, ranks: Collection[Rank]) -> list[Survivor]:
        until = time.monotonic() + _EXIT_TIMEOUT_S
        while (found := list(_survivors(ranks))) and time.monotonic() < until:
            time.sleep(_POLL_S)
        for survivor in found:
            if survivor.copy:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(survivor.pid, signal.SIGKILL)
                self._killed[survivor.pid] = survivor
        return [survivor for survivor in found if not survivor.copy]


def _survivors(ranks: Collection[Rank]) -> Iterator[Survivor]:
    if sys.platform != "linux":
        return
    groups = {rank.pid: rank.global_rank for rank in ranks}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it exited meanwhile, or is another user's
            fields = (folder / "stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
            group = int(fields[2])
            if group not in groups or fields[0] in "ZX":
                continue
            args = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            if any(name in arg for name in _HELPERS for arg in args):
                continue
            yield Survivor(int(folder.name), groups[group], _shown(args), _is_copy(args))


def _is_copy(args: list[str]) -> bool:
    own = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
    helper = any("multiprocessing" in arg for arg in args)
    return args == own or helper or os.path.abspath(rank_script.__file__) in args


def _shown(args: list[str]) -> str:
    text = " ".join(filter(None, args))
    text = "".join(char if char.isprintable() else "?" for char in text)
    return text if len(text) <= _MAX_COMMAND_CHARS else f"{text[: _MAX_COMMAND_CHARS - 1]}…"
