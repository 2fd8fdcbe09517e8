"""Run functions on ranks started by multiprocessing."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from plugframe.errors import RankFailedError, UnsupportedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import supervise
from plugframe_builtins.elastic import fork, plugin, spawn
from plugframe_builtins.elastic.launcher import Elastic


def launch(start_method: Any, function: Callable[..., Any], *args: Any, num_processes: int = 2) -> Any:
    job = Job(num_processes=num_processes, function=function, args=args)
    return Elastic(start_method=start_method).launcher_launch(job)


def failure(start_method: str, function: Callable[..., Any], *args: Any) -> RankFailedError:
    with pytest.raises(RankFailedError) as caught:
        launch(start_method, function, *args)
    return caught.value


def place(queue: Any, scale: int) -> tuple[torch.Tensor, str]:
    """Return the arguments and the rank's variables."""
    queue.put(os.getpid())
    return torch.full((2,), scale * int(os.environ["WORLD_SIZE"])), os.environ["RANK"]


def test_spawned_ranks_return_the_result_of_rank_0() -> None:
    """Arguments, queues included, reach spawned interpreters, and rank 0's result is returned by value."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    tensor, rank = launch("spawn", place, queue, 3)
    assert tensor.tolist() == [6, 6]
    assert rank == "0"
    assert len({queue.get(), queue.get(), os.getpid()}) == 3
    queue.close()


@pytest.mark.ranks
def test_forked_ranks_run_any_function_and_return_the_result_of_rank_0() -> None:
    """Forked functions and closures need not be picklable; sys.exit() returns without a result."""
    here = open(os.devnull)  # noqa: SIM115 - something no other process could be sent
    assert launch("fork", lambda extra: (here.name, extra, os.environ["RANK"]), 5) == (os.devnull, 5, "0")
    here.close()
    assert launch("fork", lambda: sys.exit()) is None
    assert launch("fork", lambda: ValueError("is a result too")).args == ("is a result too",)
    assert launch("fork", lambda: torch.get_num_threads()) == max(1, len(os.sched_getaffinity(0)) // 2) or (
        "OMP_NUM_THREADS" in os.environ
    )


@pytest.mark.ranks
def test_a_failing_function_is_told_once(capfd: pytest.CaptureFixture[str]) -> None:
    """The report starts at the user's frames, and names ranks stopped by the launcher."""

    def colour() -> None:
        if os.environ["RANK"] == "1":
            raise KeyError("green")
        signal.pause()

    error = failure("fork", colour)
    assert error.exit_code == 1
    lines = error.report.splitlines()
    assert lines[0] == f"rank 1 on {os.uname().nodename} failed: KeyError: 'green'"
    assert lines[1] == "Traceback (most recent call last):"
    assert lines[2].endswith("in colour")
    assert lines[-1] == "rank 0: stopped by the launcher"
    assert capfd.readouterr() == ("", "")


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("function", "exit_code", "said"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 137, "was killed by SIGKILL"),
        (lambda: sys.exit(3), 3, "exited with code 3"),
        (lambda: sys.exit("no data"), 1, "exited with code 1: no data"),
        (lambda: lambda: 0, 1, "failed: TypeError: The function's return value cannot be sent to the launcher: "),
        (lambda: os._exit(0), 1, "exited before the function returned"),
    ],
)
def test_every_way_for_a_function_to_fail_has_its_words(function: Callable[[], Any], exit_code: int, said: str) -> None:
    """Every way to exit is reported, also those for which torch would wait forever for a result."""
    error = failure("fork", function)
    assert said in error.report.splitlines()[0]
    assert error.exit_code == exit_code


def test_a_failure_is_not_held_up_by_what_the_rank_has_forked(tmp_path: Path) -> None:
    """A child forked by a rank holds the pipe that torch waits for, and is killed with the rank."""
    child = tmp_path / "child"

    def fork_and_fail() -> None:
        if os.environ["RANK"] != "1":
            signal.pause()
        pid = os.fork()
        if pid == 0:
            signal.pause()
        child.write_text(str(pid))
        raise ValueError("beside a child")

    assert "rank 1" in failure("fork", fork_and_fail).report
    stat = Path("/proc", child.read_text(), "stat")
    assert not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] in "ZX"


def test_what_cannot_be_spawned_is_refused_before_anything_starts() -> None:
    """One line has the object that cannot be sent, the reason, and two alternatives."""
    ways_out = "define it at the top level of a module, or use launcher='fork'"
    with pytest.raises(UsageError, match=f"launcher='spawn' cannot send the function .*<lambda> .*: {ways_out}"):
        launch("spawn", lambda: 0)
    with pytest.raises(UsageError, match=rf"cannot send argument 2 \(generator\) to the ranks .*: {ways_out}"):
        launch("spawn", place, 1, (number for number in range(3)))


def test_a_function_typed_at_a_prompt_is_not_spawned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A ``__main__`` without a file cannot be imported by a spawned interpreter; a function of a module can."""
    from plugframe_builtins.elastic.launcher import check_sendable

    def typed() -> None: ...

    prompt = types.ModuleType("__main__")
    prompt.__dict__["typed"] = typed
    typed.__module__, typed.__qualname__ = "__main__", "typed"
    monkeypatch.setitem(sys.modules, "__main__", prompt)
    with pytest.raises(UsageError, match="cannot send the function typed to the ranks .it was defined at a prompt"):
        check_sendable(typed, ())
    with pytest.raises(UsageError, match="cannot send argument 1 .partial. to the ranks .it was defined at a prompt"):
        check_sendable(place, (functools.partial(typed),))
    check_sendable(place, (1, "two"))


def test_a_script_without_a_guard_gets_one_line(tmp_path: Path) -> None:
    """Ranks that would launch again while importing the script fail with the correction."""
    script = tmp_path / "train.py"
    script.write_text(
        "from plugframe_builtins.elastic.launcher import Elastic\n"
        "from plugframe.errors import UsageError\n"
        "from plugframe.hooks.launcher import Job\n"
        "def work(): pass\n"
        "try:\n"
        "    Elastic().launcher_launch(Job(num_processes=1, function=work))\n"
        "except UsageError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120, check=True)
    assert done.stderr == ""
    assert done.stdout.splitlines() == [
        "The script launches ranks while a rank imports it: move the launch under `if __name__ == '__main__':`."
    ]


def test_forking_is_refused_once_a_device_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forking is refused after the process has used a device: the children could not use it."""
    device = types.SimpleNamespace(is_initialized=lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch, "get_device_module", lambda _: device)
    with pytest.raises(UnsupportedError, match="launcher='fork' cannot start ranks after .* used a xpu device"):
        launch("fork", lambda: 0)


def test_a_function_needs_a_start_method() -> None:
    """A plugin must pass the start method explicitly."""
    with pytest.raises(UsageError, match="pass start_method="):
        supervise(Job(num_processes=1, function=place))
    with pytest.raises(UsageError, match="start_method='thread': 'spawn' and 'fork' are possible"):
        Elastic(start_method="thread")  # type: ignore[arg-type]


def test_the_descriptors_say_what_they_can_start() -> None:
    """Scripts use the elastic launcher only, and functions typed in a notebook use fork only."""
    assert plugin.provides == ("script", "function")
    assert spawn.provides == ("function",)
    assert fork.provides == ("function", "interactive")
    assert (plugin.priority, spawn.priority, fork.priority) == (100, 50, 40)
