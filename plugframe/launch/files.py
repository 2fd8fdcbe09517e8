"""Files of the ranks: error files for the launcher, and log files of their output."""

from __future__ import annotations

import contextlib
import itertools
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
    """Torch's ``LogsSpecs`` with a folder per attempt and local rank, below the launcher's folder.

    Torch calls `reify` whenever it starts the ranks. Output goes to the terminal unmodified unless `output` redirects
    it.
    """

    def __init__(self, root: str, on_attempt: Callable[[int], None], output: Output, *, one_node: bool) -> None:
        super().__init__(root)
        self._one_node = one_node
        self.root = Path(root)
        self.attempt = -1
        self._on_attempt = on_attempt
        self._output = output
        self._log_attempt = -1

    @property
    def log_folder(self) -> Path | None:
        """The folder with the saved output of the current attempt; None if output is not saved."""
        return (
            self._output.attempt_folder(self._log_attempt)
            if self._output.folder is not None and self._log_attempt >= 0
            else None
        )

    @property
    def root_log_dir(self) -> str:
        return str(self.root)

    @property
    def start_file(self) -> Path:
        """The error file of a rank that fails before its own error file is set."""
        return self.root / "start.json"

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        """Create the files of a new attempt, and set their paths in the ranks' environment."""
        if self.attempt >= 0:
            self._on_attempt(self.attempt + 1)
        self.attempt += 1
        ranks = {local_rank: int(environ["RANK"]) for local_rank, environ in envs.items()}
        self._log_attempt = self._output.create_attempt_folder(self._log_attempt + 1, list(ranks.values()))
        error_files = {}
        for local_rank, environ in envs.items():
            folder = self._folder(local_rank)
            folder.mkdir(parents=True)
            error_files[local_rank] = str(self.error_file(local_rank))
            environ[ERROR_FILE] = error_files[local_rank]
            environ["TORCHELASTIC_RESTART_COUNT"] = str(self.attempt)
            if self._one_node:
                # A file store, because the TCP store on loopback is open to every user of the machine; that one serves
                # scripts that call init_process_group themselves.
                environ[MEETING] = str(self.root / f"attempt-{self.attempt}" / "store")
            environ[TORCH_SIGNALS] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # torch's default, for a launcher inside a rank
            if self._output.terminal_rank is not None:
                environ[DEBUG] = str(int(ranks[local_rank] == self._output.terminal_rank))
        (stdouts, teed_stdouts), (stderrs, teed_stderrs) = (self._streams(ranks, stream) for stream in STREAMS)
        return LogsDest(stdouts, stderrs, teed_stdouts, teed_stderrs, error_files)

    def _streams(self, ranks: Mapping[int, int], stream: str) -> tuple[dict[int, str], dict[int, str]]:
        """Return the file of a stream by local rank, and those of the files that the terminal shows."""
        files, teed = {}, {}
        for local_rank, rank in ranks.items():
            folder = self._folder(local_rank)
            files[local_rank] = self._output.file(rank, stream, attempt=self._log_attempt, default_folder=folder)
            if self._output.shows(rank, stream):
                teed[local_rank] = files[local_rank]
        return files, teed

    def error_file(self, local_rank: int) -> Path:
        """Return the path of the error file of a rank of the current attempt."""
        return self._folder(local_rank) / "error.json"

    def read_error(self, local_rank: int) -> dict[str, Any] | None:
        """Return the content of a rank's error file, None if it has not written one."""
        return read_error_file(self.error_file(local_rank))

    def save_traceback(self, rank: int, error: Mapping[str, Any]) -> None:
        """Write the traceback of a rank next to its saved output; does nothing if output is not saved."""
        if self.log_folder is None:
            return
        message = error["message"]
        text = message["extraInfo"]["py_callstack"] or f"{message['message']}\n"
        with contextlib.suppress(OSError):  # a full disk must not hide the failure
            (self.log_folder / f"rank-{rank}.failure.txt").write_text(text, encoding="utf-8")

    def crash_stack(self, local_rank: int) -> str:
        """Return the stack of a rank that crashed, without the launcher's frames; empty if it did not crash_stack."""
        path = self._folder(local_rank) / CRASH_FILE
        if not path.exists():
            return ""
        text = path.read_text(encoding="utf-8", errors="replace")
        head, separator, own = text.partition("Current thread ")
        if separator:  # drop the other threads, which only wait
            text = f"{head.splitlines()[0]}\n{separator}{own}"
        launch = os.path.dirname(os.path.abspath(__file__))
        # Innermost frame first: from the entry point on, all frames are the launcher's.
        lines = itertools.takewhile(lambda line: launch not in line, text.splitlines())
        return "\n".join(line for line in lines if not line.startswith("Extension modules:"))

    def done(self, local_rank: int) -> bool:
        """Return whether the function has returned on a rank of the current attempt."""
        return (self._folder(local_rank) / DONE_FILE).exists()

    def _folder(self, local_rank: int) -> Path:
        return self.root / f"attempt-{self.attempt}" / str(local_rank)


def read_error_file(path: Path) -> dict[str, Any] | None:
    """Return the content of an error file, None if there is none.

    The script may have written it with torch's ``@record``, which has fewer fields.
    """
    if not path.exists():
        return None
    data: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(data["message"], dict):
        return None
    timestamp = float(data["message"]["extraInfo"]["timestamp"])
    return {"types": [], "exit_code": 1, "said": "", "time": timestamp, "step": 0, "blamed": None, **data}
