"""Signals to the launcher end every rank, print one line, and set the exit code."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

import warm
from processes import is_alive, wait_for

TRAIN = """
import os, signal, sys, time, warnings
from plugframe import Lite

warnings.simplefilter("ignore")  # Python from 3.12 on warns of a fork beside threads

def job(lite):
    lite.barrier()
    if os.fork() == 0:
        open(f"here-{lite.global_rank}-child-{os.getpid()}", "w").close()
        signal.pause()  # a child of the script's own, a server for data, say
        os._exit(0)
    open(f"here-{lite.global_rank}-itself-{os.getpid()}", "w").close()
    if sys.argv[1] == "waiting" and lite.global_rank == 0:
        lite.barrier()
    while True:
        if sys.argv[1] == "waiting":
            signal.pause()

if __name__ == "__main__" and sys.argv[2] == "launch(fn)":
    Lite(accelerator="cpu", devices=2, strategy="ddp").launch(job)
elif __name__ == "__main__":
    lite = Lite(accelerator="cpu")
    lite.launch()
    job(lite)
"""
RUN = "plugframe run"

#: How it started; signal, to the launcher alone or to all of its group as from a terminal, the exit code, and what the
#: ranks do.
SIGNALS = [
    (RUN, "SIGINT", False, 130, "busy"),
    (RUN, "SIGINT", True, 130, "waiting"),
    (RUN, "SIGTERM", False, 143, "waiting"),
    (RUN, "SIGHUP", False, 129, "busy"),
    (RUN, "SIGKILL", False, -signal.SIGKILL, "waiting"),
    (RUN, "SIGKILL", True, -signal.SIGKILL, "busy"),
    ("launch(fn)", "SIGINT", True, 130, "busy"),
    ("launch(fn)", "SIGTERM", False, 143, "waiting"),
    ("launch(fn)", "SIGKILL", False, -signal.SIGKILL, "busy"),
]


@pytest.mark.parametrize(
    ("how", "name", "group", "code", "doing"),
    SIGNALS,
    ids=[f"{how}-{name}{'-group' if group else ''}-{doing}" for how, name, group, _, doing in SIGNALS],
)
def test_a_signal_ends_all(how: str, name: str, group: bool, code: int, doing: str, tmp_path: Path) -> None:
    """Ranks in a collective or busy, and their child processes, end; after SIGKILL nothing is printed."""
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "temporary").mkdir()
    words = ["-m", "plugframe", "run", "--devices=2"] if how == RUN else []
    command = [sys.executable, *words, "train.py", doing, how]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")}
    with (tmp_path / "said").open("w") as said:
        launcher = warm.Popen(command, cwd=tmp_path, env=environment, stdout=said, stderr=said, start_new_session=True)
        try:
            wait_for(lambda: len(list(tmp_path.glob("here-*"))) == 4)
            (os.killpg if group else os.kill)(launcher.pid, signal.Signals[name])
            assert launcher.wait(60) == code, (tmp_path / "said").read_text()
            pids = [int(path.name.rpartition("-")[2]) for path in tmp_path.glob("here-*")]
            wait_for(lambda: not any(map(is_alive, pids)))
            wait_for(lambda: not list((tmp_path / "temporary").iterdir()))
        finally:
            for path in tmp_path.glob("here-*"):
                if is_alive(int(path.name.rpartition("-")[2])):
                    os.kill(int(path.name.rpartition("-")[2]), signal.SIGKILL)
    lines = [
        line for line in (tmp_path / "said").read_text().splitlines() if not line.startswith("plugframe: ddp on 2")
    ]
    if (how, name) == ("launch(fn)", "SIGKILL"):  # multiprocessing has a word of its own, of semaphores it took back
        lines = [line for line in lines if "resource_tracker" not in line and "warnings.warn" not in line]
    assert lines == ([] if name == "SIGKILL" else [f"{name}: all ranks were stopped."])
