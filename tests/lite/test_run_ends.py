"""How runs end, for loggers: with an error or without, in a ``with`` block or at the end of the process."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import warm
from plugframe import Lite, hookimpl
from plugframe.base import Extension, Logger

EXIT = sys.exit


class Notes(Logger):
    """Keeps the errors that runs end with."""

    def __init__(self) -> None:
        self.errors: list[BaseException | None] = []

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        self.errors.append(error)


class First(Logger):
    """A logger of the first contract: its tear-down takes no error."""

    ended = 0

    @hookimpl
    def logger_teardown(self) -> None:  # type: ignore[override]
        self.ended += 1


def cpu(*loggers: Any, **settings: Any) -> Lite:
    return Lite(accelerator="cpu", devices=1, loggers=list(loggers), **settings)


def burst(lite: Lite, error: BaseException | None = None) -> None:
    """Raise in the block of a job."""
    with lite:
        lite.launch()
        raise error or ValueError("the boiler has burst")


def test_the_error_of_a_block_reaches_the_loggers() -> None:
    """A logger of the first contract, which takes none, is torn down too."""
    notes, first = Notes(), First()
    with pytest.raises(ValueError, match="boiler"):
        burst(cpu(notes, first))
    assert [str(error) for error in notes.errors] == ["the boiler has burst"]
    assert first.ended == 1


def test_what_is_no_failure_is_no_error() -> None:
    """A block that ends, leaves with the exit code 0, or runs while another exception is handled."""
    notes = Notes()
    with cpu(notes) as lite:
        lite.launch()
    with pytest.raises(SystemExit):
        burst(cpu(notes), SystemExit(0))
    try:
        raise ImportError("no accelerated version")
    except ImportError:
        with cpu(notes) as lite:
            lite.launch()
    assert notes.errors == [None] * 3


def test_the_error_can_be_given_or_is_the_one_that_is_handled() -> None:
    """`teardown` in a finally clause, and with an argument."""
    notes = Notes()

    def run() -> None:
        lite = cpu(notes)
        lite.launch()
        try:
            raise KeyError("missing")
        finally:
            lite.teardown()

    with pytest.raises(KeyError):
        run()
    lite = cpu(notes)
    lite.launch()
    lite.teardown(ValueError("given"))
    assert [type(error) for error in notes.errors] == [KeyError, ValueError]


def test_a_tear_down_that_raises_does_not_stop_the_others() -> None:
    """Every logger is torn down, and the error is raised."""

    class Fails(Logger):
        @hookimpl
        def logger_teardown(self, error: BaseException | None = None) -> None:
            raise OSError("the disk is full")

    notes = [Notes(), Notes()]
    lite = cpu(notes[0], Fails(), notes[1])
    lite.launch()
    with pytest.raises(OSError, match="the disk is full"):
        lite.teardown(ValueError("given"))
    assert all(type(each.errors[-1]) is ValueError for each in notes)


def test_an_extension_sees_the_error() -> None:
    """A wrapper of `logger_teardown` takes the argument."""
    seen: list[BaseException | None] = []

    class Watches(Extension):
        @hookimpl(wrapper=True)
        def logger_teardown(self, error: BaseException | None) -> Any:
            seen.append(error)
            return (yield)

    with pytest.raises(ValueError, match="boiler"):
        burst(cpu(Notes(), plugins=[Watches()]))
    assert [str(error) for error in seen] == ["the boiler has burst"]


SCRIPT = """
import sys
from plugframe import Lite

lite = Lite(accelerator="cpu", loggers="csv")
lite.launch()
lite.log("loss", 1.0)

def main():
    if "caught" in sys.argv:
        try:
            sys.exit(4)
        except SystemExit:
            pass
    if "raise" in sys.argv:
        raise ValueError("the boiler has burst")
    if "leave" in sys.argv:
        sys.exit("no boiler")

main()
"""

ENDS = [
    ("end", "finished", None),
    ("caught", "finished", None),
    ("raise", "failed", "ValueError: the boiler has burst"),
    ("leave", "failed", "SystemExit: no boiler"),
]


def recorded(folder: Path) -> tuple[str, str | None, str]:
    (run,) = (folder / "runs").iterdir()
    found = json.loads((run / "run.json").read_text())
    return found["status"], found["error"], (run / "metrics.csv").read_text()


@pytest.mark.ranks
@pytest.mark.parametrize(("word", "status", "error"), ENDS)
def test_a_script_without_a_block_is_recorded(
    tmp_path: Path, run_script: Any, word: str, status: str, error: str | None
) -> None:
    """A script that raises or leaves with an exit code is a failed run, with its metrics."""
    run_script(tmp_path, SCRIPT, [sys.executable, "train.py", word])
    assert recorded(tmp_path) == (status, error, "step,loss\n0,1.0\n")


@pytest.mark.ranks
@pytest.mark.parametrize(("word", "status", "error"), ENDS)
def test_a_job_of_two_ranks_is_recorded(
    tmp_path: Path, run_script: Any, word: str, status: str, error: str | None
) -> None:
    """So is a job whose ranks are started."""
    command = [sys.executable, "-m", "plugframe", "run", "train.py", "--devices=2", "--accelerator=cpu", word]
    run_script(tmp_path, SCRIPT, command)
    assert recorded(tmp_path) == (status, error, "step,loss\n0,1.0\n")


STOPPED = """
import os, signal, sys, time
from plugframe import Lite

lite = Lite(accelerator="cpu", loggers="csv")
lite.launch()
lite.log("loss", 1.0)
if "term" in sys.argv:
    os.kill(os.getpid(), signal.SIGTERM)
if lite.global_rank == 1:
    raise ValueError("the boiler has burst")
if "busy" in sys.argv:
    time.sleep(60)
lite.barrier()
"""


@pytest.mark.ranks
@pytest.mark.parametrize("word", ["busy", "waits"])
def test_a_job_is_recorded_as_failed_if_another_rank_fails(tmp_path: Path, run_script: Any, word: str) -> None:
    """Rank 0 is stopped with SIGTERM, or loses the connection: its metrics are written either way."""
    command = [sys.executable, "-m", "plugframe", "run", "train.py", "--devices=2", "--accelerator=cpu", word]
    run_script(tmp_path, STOPPED, command)
    status, error, metrics = recorded(tmp_path)
    assert (status, metrics) == ("failed", "step,loss\n0,1.0\n")
    assert str(error).startswith(("SystemExit: terminated by SIGTERM", "RankLostError: "))


@pytest.mark.ranks
def test_a_terminated_script_dies_of_the_signal(tmp_path: Path, run_script: Any) -> None:
    """What it has logged is written, and its exit code is that of the signal."""
    done = run_script(tmp_path, STOPPED, [sys.executable, "train.py", "term"])
    assert done.returncode == -15
    assert recorded(tmp_path) == ("failed", "SystemExit: terminated by SIGTERM", "step,loss\n0,1.0\n")


def test_the_default_of_the_signal_is_restored() -> None:
    """Also if the job has handled the signal by itself meanwhile."""
    before = signal.getsignal(signal.SIGTERM)
    with cpu(Notes()) as lite:
        assert not lite.should_stop
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before
    assert sys.exit is EXIT


@pytest.fixture
def run_script() -> Any:
    """Run a script in a folder."""

    def run(folder: Path, code: str, command: list[str]) -> Any:
        (folder / "train.py").write_text(code)
        # How the interpreter of the script itself ends is found by its outermost frame.
        start = warm.run if "plugframe" in command else subprocess.run
        return start(command, cwd=folder, capture_output=True, timeout=120, check=False)

    return run
