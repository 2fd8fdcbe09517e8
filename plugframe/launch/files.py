"""The files of a rank: those through which it tells its launcher how it fared, and those that keep its output."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from plugframe.hooks.variables import MEETING
from plugframe.launch.function import DONE_FILE
from plugframe.launch.output import STREAMS, Output
from plugframe.launch.rank import CRASH_FILE, DEBUG, ERROR_FILE
from plugframe.launch.signals import TORCH_SIGNALS


class RankFiles(LogsSpecs):
    """One folder for each attempt and local rank, below a folder that the launcher removes at the end.

    Torch asks it for files whenever it starts the ranks: output goes to the terminal, as it is, unless asked otherwise.
    """

    def __init__(self, root: str, on_attempt: Callable[[int], None], output: Output, *, one_node: bool) -> None:
        super().__init__(root)
        self._one_node = one_node
        self.root = Path(root)
        self.attempt = -1
        self._on_attempt = on_attempt
        self._output = output
        self._kept = -1

    @property
    def kept(self) -> Path | None:
        """The folder with the output of the current attempt; None if it is not kept."""
        return self._output.attempt_folder(self._kept) if self._output.folder is not None and self._kept >= 0 else None

    @property
    def root_log_dir(self) -> str:
        return str(self.root)

    @property
    def start_file(self) -> Path:
        """The error file of a rank that has not begun its work yet."""
        return self.root / "start.json"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Make the files of a new attempt, and name them in the ranks' environment."""
        if self.attempt >= 0:
            self._on_attempt(self.attempt + 1)
        self.attempt += 1
        ranks = {local_rank: int(environ["RANK"]) for local_rank, environ in envs.items()}
        self._kept = self._output.begin(self._kept + 1, list(ranks.values()))
        error_files = {}
        for local_rank, environ in envs.items():
            folder = self._folder(local_rank)
            folder.mkdir(parents=True)
            error_files[local_rank] = str(self.error_file(local_rank))
            environ[ERROR_FILE] = error_files[local_rank]
            environ["TORCHELASTIC_RESTART_COUNT"] = str(self.attempt)
            if self._one_node:
                # Not the store on loopback, which every user of the machine can reach: it serves scripts that call
                # init_process_group themselves.
                environ[MEETING] = str(self.root / f"attempt-{self.attempt}" / "store")
            environ[TORCH_SIGNALS] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # torch's default, for a launcher inside a rank
            if self._output.at_terminal is not None:
                environ[DEBUG] = str(int(ranks[local_rank] == self._output.at_terminal))
        (stdouts, shown_stdouts), (stderrs, shown_stderrs) = (self._streams(ranks, stream) for stream in STREAMS)
        return LogsDest(stdouts, stderrs, shown_stdouts, shown_stderrs, error_files)

    def _streams(self, ranks: Mapping[int, int], stream: str) -> tuple[dict[int, str], dict[int, str]]:
        """Return where a stream of each local rank goes, and of those files the ones that the terminal shows."""
        files, shown = {}, {}
        for local_rank, rank in ranks.items():
            folder = self._folder(local_rank)
            files[local_rank] = self._output.file(rank, stream, attempt=self._kept, otherwise=folder)
            if self._output.shows(rank, stream):
                shown[local_rank] = files[local_rank]
        return files, shown

    def error_file(self, local_rank: int) -> Path:
        """Return where a rank of the current attempt leaves its last words."""
        return self._folder(local_rank) / "error.json"

    def words(self, local_rank: int) -> dict[str, Any] | None:
        """Return what a rank of the current attempt said of its failure, None if nothing."""
        return read_words(self.error_file(local_rank))

    def keep_words(self, rank: int, words: Mapping[str, Any]) -> None:
        """Write what a rank said of its failure, its traceback, beside its output; nothing if that is not kept."""
        if self.kept is None:
            return
        message = words["message"]
        text = message["extraInfo"]["py_callstack"] or f"{message['message']}\n"
        with contextlib.suppress(OSError):  # a full disk is no reason to hide the failure
            (self.kept / f"rank-{rank}.failure.txt").write_text(text, encoding="utf-8")

    def crash(self, local_rank: int) -> str:
        """Return the stack a rank left when it crashed, without what surrounds the user's code."""
        path = self._folder(local_rank) / CRASH_FILE
        if not path.exists():
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        head, separator, own = text.partition("Current thread ")
        if separator:  # the others only wait
            text = f"{head.splitlines()[0]}\n{separator}{own}"
        lines = text.splitlines()
        launch = os.path.dirname(os.path.abspath(__file__))
        return "\n".join(line for line in lines if launch not in line and not line.startswith("Extension modules:"))

    def done(self, local_rank: int) -> bool:
        """Say whether the function has returned on a rank of the current attempt."""
        return (self._folder(local_rank) / DONE_FILE).exists()

    def _folder(self, local_rank: int) -> Path:
        return self.root / f"attempt-{self.attempt}" / str(local_rank)


def read_words(path: Path) -> dict[str, Any] | None:
    """Return the content of an error file, None if there is none.

    A script may have written its own with torch's ``@record`` and left without another word.
    """
    if not path.exists():
        return None
    words: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(words["message"], dict):
        return None
    stamp = float(words["message"]["extraInfo"]["timestamp"])
    return {"types": [], "exit_code": 1, "said": "", "time": stamp, "step": 0, "blamed": None, **words}
