"""Processes left by finished ranks, stopped ranks, and the time to exit after Ctrl-C."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from plugframe.launch import monitor as monitoring
from plugframe.launch.monitor import Rank, RankMonitor
from processes import is_alive, wait_for

TRAIN = """
import os, signal, subprocess, sys, warnings
from plugframe import Lite

warnings.simplefilter("ignore")  # Python from 3.12 on warns of a fork beside threads

def job(lite):
    if lite.global_rank == 1 and "stops" in sys.argv:
        os.kill(os.getpid(), signal.SIGSTOP)
    lite.barrier()
    if lite.global_rank == 1:
        copy = os.fork()
        if copy == 0:
            signal.pause()
        sleeps = [subprocess.Popen(["sleep", "100"], start_new_session=own).pid for own in (False, True)]
        open("started", "w").write(f"{copy} {sleeps[0]} {sleeps[1]}")
    return lite.global_rank

if __name__ == "__main__" and "launch" in sys.argv:
    assert Lite(accelerator="cpu", devices=2, strategy="ddp", launcher="fork").launch(job) == 0
elif __name__ == "__main__":
    job(Lite(accelerator="cpu"))
"""


@pytest.mark.parametrize("how", ["stops", "launch"])
def test_what_ranks_leave_running_is_told(how: str, tmp_path: Path) -> None:
    """Copies of a rank are killed, programs continue, and one line names both; those in a new session are ignored.

    A stopped rank is reported while the others wait for it.
    """
    (tmp_path / "train.py").write_text(TRAIN)
    words = [] if how == "launch" else ["-m", "plugframe", "run", "--devices=2"]
    said, started = tmp_path / "said", tmp_path / "started"
    with said.open("w") as file:
        launcher = subprocess.Popen(
            [sys.executable, *words, "train.py", how],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            stderr=file,
        )
        try:
            if how == "stops":
                wait_for(lambda: "is stopped" in said.read_text())
                os.kill(int(re.search(r"rank 1 \(process (\d+)\) is stopped", said.read_text())[1]), signal.SIGCONT)  # type: ignore[index]
            code = launcher.wait(100)
            copy, program, apart = map(int, started.read_text().split())
            text = said.read_text()
            assert code == 0, text
            assert re.search(rf"left running .*process {copy} of rank 1 \(.*; killed\)", text)
            assert re.search(rf"process {program} of rank 1 \(sleep 100; still running\)", text)
            assert f"process {apart} " not in text
            assert text.count("left running") == 1
            wait_for(lambda: not is_alive(copy))
            assert is_alive(program)
        finally:
            launcher.kill()
            for pid in started.read_text().split()[1:] if started.exists() else ():
                os.kill(int(pid), signal.SIGKILL)


def test_ranks_are_polled_where_the_system_has_no_waitid(monkeypatch: pytest.MonkeyPatch) -> None:
    """A beat then wakes nobody: a poll that was woken would never count the time ranks take to exit."""
    monkeypatch.setattr(monitoring, "_CAN_WAIT", False)
    monkeypatch.setattr(RankMonitor, "start", lambda self: None)
    settings: dict[str, Any] = {"done": lambda rank: False, "error_file": lambda rank: Path("none"), "grace_s": 30.0}
    monitor = RankMonitor(
        ranks=lambda: [Rank(os.getpid(), 0, 0)],
        received=lambda: None,
        resend_signal=lambda: None,
        stop_requested=lambda: False,
        on_success=lambda rank: None,
        **settings,
    )
    monitor.beat()
    monitor._await_exits()
    assert not monitor._wake.is_set()
    assert not monitor._waiters


@pytest.mark.parametrize(("signum", "gone"), [(signal.SIGINT, True), (signal.SIGTERM, False), (None, False)])
def test_on_ctrl_c_ranks_have_less_than_a_second(signum: signal.Signals | None, gone: bool) -> None:
    """After Ctrl-C ranks have less than a second; after a scheduler's signal they have the grace period."""
    child = subprocess.Popen(["sleep", "100"])
    rank = Rank(child.pid, 0, 0)
    settings: dict[str, Any] = {"done": lambda rank: False, "error_file": lambda rank: Path("none"), "grace_s": 30.0}
    monitor = RankMonitor(
        ranks=lambda: [rank],
        received=lambda: signum,
        resend_signal=lambda: None,
        stop_requested=lambda: False,
        on_success=lambda rank: None,
        **settings,
    )
    try:
        assert monitor._overdue(0.5) == []
        assert (monitor._overdue(1.0) == [rank]) is gone
    finally:
        child.kill()
        child.wait()
