"""The files through which a rank tells its launcher how it fared."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs

from plugframe.launch.function import DONE_FILE
from plugframe.launch.rank import CRASH_FILE, ERROR_FILE
from plugframe.launch.signals import TORCH_SIGNALS


class RankFiles(LogsSpecs):
    """One folder for each attempt and local rank, below a folder that the launcher removes at the end.

    Torch asks it for files whenever it starts the ranks: output goes to the terminal, as it is.
    """

    def __init__(self, root: str, on_attempt: Callable[[int], None]) -> None:
        super().__init__(root)
        self.root = Path(root)
        self.attempt = -1
        self._on_attempt = on_attempt

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
        error_files = {}
        for local_rank, environ in envs.items():
            folder = self._folder(local_rank)
            folder.mkdir(parents=True)
            error_files[local_rank] = str(self.error_file(local_rank))
            environ[ERROR_FILE] = error_files[local_rank]
            environ["TORCHELASTIC_RESTART_COUNT"] = str(self.attempt)
            environ[TORCH_SIGNALS] = "SIGTERM,SIGINT,SIGHUP,SIGQUIT"  # torch's default, for a launcher inside a rank
        quiet = dict.fromkeys(envs, "")
        return LogsDest(stdouts=quiet, stderrs=dict(quiet), error_files=error_files)

    def error_file(self, local_rank: int) -> Path:
        """Return where a rank of the current attempt leaves its last words."""
        return self._folder(local_rank) / "error.json"

    def words(self, local_rank: int) -> dict[str, Any] | None:
        """Return what a rank of the current attempt said of its failure, None if nothing."""
        return read_words(self.error_file(local_rank))

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
