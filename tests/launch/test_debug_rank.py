"""Debug one rank: it has the terminal to itself, and the others wait for it."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import termios
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from plugframe.cli import cli
from plugframe.core.config.request import gather
from plugframe.errors import UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import supervise
from plugframe.launch.debug import DEBUG_TIMEOUT_S
from plugframe_builtins.elastic.launcher import Elastic

PROMPT = "(Pdb) "
#: Makes a terminal the one that keys like Ctrl-C go to, then becomes the command.
TAKE = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"
_LIMIT_S = 100


class Terminal:
    """Runs a command at a pseudo-terminal and types into it."""

    def __init__(self, folder: Path, *words: str) -> None:
        self._master, slave = pty.openpty()
        self._slave = slave
        self.before = termios.tcgetattr(slave)
        command = [sys.executable, "-c", TAKE, sys.executable, "-m", "plugframe", "run", *words]
        environ = {**os.environ, "TERM": "dumb"}  # no colours, no bells
        self._process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=folder, env=environ
        )
        self.seen = ""
        self._read = 0

    def expect(self, text: str) -> str:
        """Read until `text`, and return the output before it."""
        while text not in self.seen[self._read :]:
            ready, _, _ = select.select([self._master], [], [], _LIMIT_S)
            assert ready, f"no {text!r} in {self.seen[self._read :]!r}"
            self.seen += os.read(self._master, 4096).decode().replace("\r\n", "\n")
            assert self._process.poll() is None or text in self.seen[self._read :], f"ended: {self.seen}"
        before, _, _ = self.seen[self._read :].partition(text)
        self._read += len(before) + len(text)
        return before

    def type(self, line: str, *, expect: str = PROMPT) -> str:
        """Type a line or a key, and return the response."""
        os.write(self._master, (line if line < " " else f"{line}\n").encode())
        return self.expect(expect)

    def end(self) -> int:
        """Wait for the process to end, and return its exit code."""
        code = self._process.wait(_LIMIT_S)
        while select.select([self._master], [], [], 0)[0]:
            self.seen += os.read(self._master, 4096).decode().replace("\r\n", "\n")
        return code

    def settings(self) -> list[Any]:
        """Return the terminal's attributes."""
        return termios.tcgetattr(self._slave)

    def close(self) -> None:
        """Kill the command if it still runs."""
        if self._process.poll() is None:
            self._process.terminate()
            self._process.wait(_LIMIT_S)
        os.close(self._master)
        os.close(self._slave)


@pytest.fixture
def debug(tmp_path: Path) -> Iterator[Callable[..., Terminal]]:
    """Start a script with this body on two CPU ranks, with rank 1 under the debugger."""
    terminals = []

    def start(body: str, *words: str) -> Terminal:
        (tmp_path / "train.py").write_text(textwrap.dedent(body))
        words = ("--devices=2", "--accelerator=cpu", "--debug-rank=1", *words, "train.py")
        terminals.append(Terminal(tmp_path, *words))
        return terminals[-1]

    yield start
    for each in terminals:
        each.close()


def test_one_rank_is_debugged_while_the_others_wait(debug: Callable[..., Terminal], tmp_path: Path) -> None:
    """The rank stops at the first line and at breakpoint(), which other ranks skip; they do not time out."""
    terminal = debug(
        """\
        import torch
        from plugframe import Lite
        lite = Lite(timeout_s=0.5)
        lite.launch()
        breakpoint()
        print("sum", lite.all_reduce(torch.ones(1), reduce_op="sum").item(), "on", lite.global_rank)
        """,
        "--log-dir=logs",
    )
    start = terminal.expect(PROMPT)
    said, place, line = start.splitlines()
    assert said.startswith("plugframe: rank 1 runs under pdb and receives Ctrl-C; Ctrl-\\ ends the job")
    assert place == f"> {tmp_path / 'train.py'}(1)<module>()"
    assert line == "-> import torch"
    # What the others say comes in between at any time.
    stopped = terminal.type("c").splitlines()
    assert any(line.startswith(("-> print(", "-> breakpoint(")) for line in stopped), stopped  # by Python's version
    assert f"({DEBUG_TIMEOUT_S:.1f}, 1)" in terminal.type("p lite.plan.timeout_s, lite.global_rank").splitlines()
    terminal.type("c", expect="sum 2.0 on 1")
    assert terminal.end() == 0
    # The others' output is kept and shown as ever; that of the one with the terminal is there alone.
    assert "[rank 0] sum 2.0 on 0" in terminal.seen
    assert [path.name for path in sorted((tmp_path / "logs" / "attempt-0").iterdir())] == [
        "rank-0.stderr.log",
        "rank-0.stdout.log",
    ]


def test_an_exception_can_be_looked_at_where_it_came_from(debug: Callable[..., Terminal]) -> None:
    """The debugger opens at the exception; after it quits, the job ends with the usual report."""
    terminal = debug(
        """\
        import os, signal
        def mix(colour):
            raise ValueError(f"no such colour: {colour}")
        if os.environ["RANK"] == "0":
            assert os.read(0, 1) == b""  # what is typed is not for the others
            signal.pause()
        mix("green")
        """
    )
    terminal.expect(PROMPT)
    assert "Post mortem: quit, or Ctrl-D, to end the job." in terminal.type("c")
    assert "'green'" in terminal.type("p colour")
    terminal.type("q", expect="rank 0: stopped by the launcher")
    assert terminal.end() == 1
    report = terminal.seen[terminal.seen.index("rank 1 on ") :].splitlines()
    assert report[0] == f"rank 1 on {os.uname().nodename} failed: ValueError: no such colour: green"
    assert "plugframe/launch" not in "\n".join(report)


def test_ctrl_c_stops_the_debugged_rank_and_quitting_ends_the_job(debug: Callable[..., Terminal]) -> None:
    """Only the debugged rank receives the key; the terminal's settings are restored at the end."""
    terminal = debug(
        """\
        import os, signal
        if os.environ["RANK"] == "0":
            signal.pause()
        turns = 0
        while True:
            turns += 1
            if turns == 1:
                print("turning")
        """
    )
    terminal.expect(PROMPT)
    terminal.type("c", expect="turning")
    terminal.type("\x03")
    terminal.type("p turns > 0", expect="True")
    terminal.type("q", expect="rank 1 quit the debugger: all ranks were stopped.")
    assert terminal.end() == 130
    assert terminal.settings() == terminal.before


def test_ctrl_backslash_ends_a_job_under_the_debugger(debug: Callable[..., Terminal]) -> None:
    """The terminal's settings are also restored if the debugger is reading a line."""
    terminal = debug("import signal; signal.pause()")
    terminal.expect(PROMPT)
    terminal.type("\x1c", expect="SIGQUIT: all ranks were stopped.")
    assert terminal.end() == 131
    assert terminal.settings() == terminal.before


# ---------------------------------------------------------------------- what is typed


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--debug-rank=2"], "--debug-rank=2: no such rank, this job has ranks 0 to 1."),
        (["--debug-rank=-1"], "Invalid value for '--debug-rank': -1 is not in the range"),
        (["--debug-rank=one"], "Invalid value for '--debug-rank': 'one' is not a valid integer"),
        (["--debug-rank=1"], "--debug-rank=1 needs a terminal on standard input, and there is none"),
        (
            ["--debug-rank=1", "--num-nodes=1:2", "--rdzv-endpoint=localhost:4000"],
            "--debug-rank=1 requires a fixed --num-nodes: elastic jobs renumber their ranks.",
        ),
    ],
)
def test_a_rank_that_cannot_be_debugged_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    """The error has the option, the reason and the alternative; no rank runs."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").write_text("open('ran', 'w')")
    result = CliRunner().invoke(cli, ["run", "--devices=2", "--accelerator=cpu", *words, "train.py"])
    assert (result.exit_code, len(result.stderr.splitlines())) == (2, 1)
    assert said in result.stderr
    assert os.listdir() == ["train.py"]
    with pytest.raises(UsageError, match="--debug-rank=0 requires a script, and this job runs a function"):
        supervise(Job(num_processes=1, function=print, debug_rank=0), start_method="fork")


def test_every_timeout_gives_way_to_the_debugger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Timeouts from the command line and the code are replaced; a typed timeout and restarts get a warning."""
    monkeypatch.chdir(tmp_path)
    Path("train.py").touch()

    jobs = list[Job]()
    monkeypatch.setattr(Elastic, "launcher_launch", lambda self, job: jobs.append(job))
    words = ["run", "--devices=2", "--accelerator=cpu", "train.py", "--debug-rank=0", "--collective.timeout-s=5"]
    result = CliRunner().invoke(cli, [*words, "--timeout=5", "--max-restarts=2"])
    assert result.exit_code == 0
    assert sorted(result.stderr.splitlines()) == [
        "plugframe: warning: --collective.timeout-s has no effect: with --debug-rank nothing times out.",
        "plugframe: warning: --max-restarts has no effect: a job with --debug-rank starts once.",
        "plugframe: warning: --timeout has no effect: with --debug-rank nothing times out.",
    ]
    (job,) = jobs
    assert (job.debug_rank, job.max_restarts) == (0, 0)
    request = gather({"timeout_s": 1.0}, environ=job.environ, folder=tmp_path)
    assert request.value("timeout_s") == DEBUG_TIMEOUT_S
    assert [(each.key, each.value) for each in request.options] == [("collective.timeout_s", str(DEBUG_TIMEOUT_S))]
