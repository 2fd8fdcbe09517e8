"""Launch ranks of a script on one node: real processes, mostly without torch, so that they start quickly."""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from plugframe.errors import RankFailedError, UsageError
from plugframe.hooks.launcher import Job
from plugframe.launch import monitor, supervise
from plugframe.launch.folder import sweep

Write = Callable[[str], str]


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Write a script to a new folder, which becomes the working directory, and return its name."""
    monkeypatch.chdir(tmp_path)

    def write(body: str, name: str = "train.py") -> str:
        Path(name).write_text("import os, signal, sys\n" + textwrap.dedent(body))
        return name

    return write


@pytest.fixture
def handlers() -> Iterator[None]:
    """The launcher restores signal handlers and loggers in every case."""
    names = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)
    before = [signal.getsignal(name) for name in names]
    yield
    assert [signal.getsignal(name) for name in names] == before
    assert logging.getLogger("torch.distributed.elastic").propagate
    assert not logging.getLogger("torch.distributed.elastic").handlers


def launch(*command: str, num_processes: int = 2, **settings: Any) -> Any:
    return supervise(Job(num_processes=num_processes, command=command, **settings))


def failure(*command: str, **settings: Any) -> RankFailedError:
    with pytest.raises(RankFailedError) as caught:
        launch(*command, **settings)
    return caught.value


def wait_until_gone(pid: int) -> None:
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        assert select.select([descriptor], [], [], 30)[0], f"process {pid} is still there"
    finally:
        os.close(descriptor)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_the_same_failure_at_the_same_step_is_final(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """Restarts stop after two identical failures, with a message; a failure at another step is not identical."""
    path = script(
        """
        from plugframe import Lite
        import torch
        lite = Lite(accelerator="cpu")
        lite.launch()
        model = torch.nn.Linear(1, 1)
        model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
        for _ in range(2 if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" else 3):
            optimizer.step()
        raise ValueError("no such word")
        """
    )
    error = failure(path, num_processes=1, max_restarts=9)
    lines = [line for line in capfd.readouterr().err.splitlines() if "restart" in line]
    assert lines == [f"rank 0 failed (ValueError: no such word); restart {n} of 9" for n in (1, 2)]
    assert error.report.splitlines()[-1] == (
        "not restarted: rank 0 failed with the same error after step 3 as in the previous attempt"
    )
    assert error.exit_code == 1


@pytest.mark.usefixtures("handlers")
def test_a_rank_sees_its_place_and_a_script_started_as_python_starts_it(script: Write, tmp_path: Path) -> None:
    """Ranks have torchrun's variables, unchanged arguments, and the script as ``__main__`` until interpreter exit."""
    path = script(
        """
        import atexit, json, multiprocessing, pickle

        class Mine:
            pass

        def work(queue):
            queue.put(type(Mine()).__name__)

        def at_exit():
            assert sys.modules["__main__"].Mine is Mine
            found["at_exit"] = True
            with open(f"rank{os.environ['RANK']}.json", "w") as file:
                json.dump(found, file)

        if __name__ == "__main__":
            assert pickle.loads(pickle.dumps(Mine)) is Mine
            context = multiprocessing.get_context("spawn")
            queue = context.SimpleQueue()
            process = context.Process(target=work, args=(queue,))
            process.start()
            process.join()
            found = {"argv": sys.argv, "path": sys.path[0], "file": __file__, "child": queue.get()}
            found["env"] = dict(os.environ)
            atexit.register(at_exit)
        """
    )
    arguments = ("--regex", "a$$b", "${local_rank}", "-m", "")
    assert launch(path, *arguments, environ={"JOB_SAYS": "hello"}) is None
    ranks = [json.loads(Path(f"rank{rank}.json").read_text()) for rank in range(2)]
    for rank, found in enumerate(ranks):
        env = found["env"]
        assert found["argv"] == [path, *arguments]
        assert found["path"] == str(tmp_path)
        assert found["file"] == str(tmp_path / path)
        assert found["child"] == "Mine"
        assert found["at_exit"]
        assert (env["RANK"], env["LOCAL_RANK"], env["WORLD_SIZE"]) == (str(rank), str(rank), "2")
        assert (env["LOCAL_WORLD_SIZE"], env["GROUP_RANK"], env["GROUP_WORLD_SIZE"]) == ("2", "0", "1")
        assert (env["MASTER_ADDR"], env["TORCHELASTIC_USE_AGENT_STORE"]) == ("127.0.0.1", "True")
        assert env["JOB_SAYS"] == "hello"
    assert ranks[0]["env"]["MASTER_PORT"] == ranks[1]["env"]["MASTER_PORT"]


def test_cores_are_shared_among_the_ranks(script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """OMP_NUM_THREADS is the rank's share of the cores, at least 1, unless it is set."""
    path = script("open(os.environ['RANK'], 'w').write(os.environ['OMP_NUM_THREADS'])")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    cores = len(os.sched_getaffinity(0))
    launch(path, num_processes=1)
    assert Path("0").read_text() == str(cores)
    launch(path, num_processes=cores + 1)
    assert Path("0").read_text() == "1"
    launch(path, num_processes=1, environ={"OMP_NUM_THREADS": "7"})
    assert Path("0").read_text() == "7"


def test_a_module_runs_with_dash_m(script: Write, tmp_path: Path) -> None:
    """``-m`` runs a module or a package from the working directory, with interpreter options before it."""
    Path("pkg").mkdir()
    script("")
    Path("pkg/__init__.py").touch()
    Path("pkg/__main__.py").write_text(
        "import sys\nfrom . import other\n"
        "open('said', 'w').write(repr([sys.argv, sys.path[0], __name__, __spec__.name, sys.flags.dev_mode]))"
    )
    Path("pkg/other.py").touch()
    launch("-m", "pkg", "-x", num_processes=1, interpreter_options=("-X", "dev"))
    main = str(tmp_path / "pkg" / "__main__.py")
    assert Path("said").read_text() == repr([[main, "-x"], str(tmp_path), "__main__", "pkg.__main__", True])
    report = failure("-m", "pkg.nothing", num_processes=1).report
    assert "failed: ModuleNotFoundError: No module named 'pkg.nothing' that can be executed" in report


@pytest.mark.usefixtures("handlers")
def test_a_failed_rank_is_told_once_and_nobody_is_left(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """The report has rank, host, cause, the script's own frames and the outcome of other ranks, and nothing else."""
    path = script(
        """
        import json, subprocess

        def step():
            raise ValueError("no such colour")

        sleeper = subprocess.Popen(["sleep", "600"])
        with open(f"pids{os.environ['RANK']}", "w") as file:
            json.dump([os.getpid(), sleeper.pid], file)
        if os.environ["RANK"] == "1":
            while not os.path.exists("pids0"):
                pass
            step()
        signal.pause()
        """
    )
    error = failure(path)
    host = os.uname().nodename
    where = Path(path).absolute()
    assert error.exit_code == 1
    assert error.report.splitlines()[:7] == [
        f"rank 1 on {host} failed: ValueError: no such colour",
        "Traceback (most recent call last):",
        f'  File "{where}", line 14, in <module>',
        "    step()",
        f'  File "{where}", line 6, in step',
        '    raise ValueError("no such colour")',
        "ValueError: no such colour",
    ]
    assert error.report.splitlines()[7:] == ["rank 0: stopped by the launcher"]
    assert capfd.readouterr() == ("", "")
    for rank in range(2):
        for pid in json.loads(Path(f"pids{rank}").read_text()):
            wait_until_gone(pid)


@pytest.mark.parametrize(
    ("body", "exit_code", "said"),
    [
        ("os.kill(os.getpid(), signal.SIGKILL)", 137, "was killed by SIGKILL"),
        ("os._exit(3)", 3, "exited with code 3"),
        ("sys.exit(4)", 4, "exited with code 4"),
        ("sys.exit('no data')", 1, "exited with code 1: no data"),
        ("def broken(:", 1, "failed: SyntaxError: invalid syntax (train.py, line 3)"),
    ],
)
def test_every_way_to_fail_has_its_words(script: Write, body: str, exit_code: int, said: str) -> None:
    """The exit code is the rank's own, 128 + n for signal n, and the first line has the cause."""
    error = failure(script(f"\n{body}"), num_processes=1)
    assert error.report.splitlines()[0] == f"rank 0 on {os.uname().nodename} {said}"
    assert error.exit_code == exit_code


def test_a_crash_shows_where_it_happened(script: Write) -> None:
    """The report of a crash in native code has the Python stack."""
    error = failure(
        script(
            """
            import faulthandler

            def native():
                faulthandler._sigsegv()

            native()
            """
        ),
        num_processes=1,
    )
    assert error.exit_code == 139
    lines = error.report.splitlines()
    assert lines[0].endswith("was killed by SIGSEGV")
    assert "in native" in error.report
    assert "plugframe/launch" not in error.report


def test_a_rank_that_ignores_the_end_is_ended(script: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that do not exit after another rank's failure, or hang while exiting, are killed."""
    monkeypatch.setattr(monitor, "EXIT_TIMEOUT_S", 0.3)
    monkeypatch.setattr(monitor, "ERROR_EXIT_TIMEOUT_S", 0.3)
    path = script(
        """
        import threading
        if os.environ["RANK"] == "0":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            open("deaf", "w").close()
            signal.pause()
        while not os.path.exists("deaf"):
            pass
        threading.Thread(target=signal.sigwait, args=([signal.SIGUSR1],)).start()
        raise ValueError("hangs at exit")
        """
    )
    error = failure(path)
    assert "rank 1 on" in error.report
    assert "ValueError: hangs at exit" in error.report
    assert error.report.endswith("rank 0: stopped by the launcher")
    assert error.exit_code == 1


def test_a_failed_group_starts_again_with_a_store_of_its_own(script: Write, capfd: pytest.CaptureFixture[str]) -> None:
    """A restart prints one line, and uses another port, where no address of the first attempt remains."""
    path = script(
        """
        attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
        open(f"port-{attempt}-{os.environ['RANK']}", "w").write(os.environ["MASTER_PORT"])
        while not all(os.path.exists(f"port-{attempt}-{rank}") for rank in (0, 1)):
            pass
        if attempt == "0" and os.environ["RANK"] == "1":
            raise ValueError("the first time")
        if attempt == "1" and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt < "2":
            signal.pause()
        """
    )
    launch(path, max_restarts=3)
    first, second = capfd.readouterr().err.splitlines()
    assert first == "rank 1 failed (ValueError: the first time); restart 1 of 3"
    # Torch does not report exit codes between attempts: without an error file the code may be unknown.
    assert second in ("rank 0 failed (was killed by SIGKILL); restart 2 of 3", "a rank failed; restart 2 of 3")
    ports = [[Path(f"port-{attempt}-{rank}").read_text() for rank in (0, 1)] for attempt in range(3)]
    assert all(a == b for a, b in ports)
    assert len({a for a, _ in ports}) == 3


@pytest.mark.usefixtures("handlers")
@pytest.mark.parametrize(("name", "exit_code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_a_signal_to_the_launcher_ends_every_rank(script: Write, name: str, exit_code: int) -> None:
    """Ranks receive the signal too; the report is one line, the exit code 128 + its number."""
    path = script(
        f"""
        def leave(signum, frame):
            open(f"got{{os.environ['RANK']}}", "w").write(signal.Signals(signum).name)
            sys.exit(0)

        signal.signal(signal.{name}, leave)
        open(f"ready{{os.environ['RANK']}}", "w").close()
        while not (os.path.exists("ready0") and os.path.exists("ready1")):
            pass
        if os.environ["RANK"] == "0":
            os.kill(os.getppid(), signal.{name})
        while True:
            signal.pause()
        """
    )
    error = failure(path)
    assert (error.report, error.exit_code) == (f"{name}: all ranks were stopped.", exit_code)
    assert [Path(f"got{rank}").read_text() for rank in (0, 1)] == [name, name]


def test_a_second_signal_ends_the_ranks_at_once(script: Write) -> None:
    """A second Ctrl-C kills ranks that ignore the first."""
    path = script(
        """
        count = 0

        def again(signum, frame):
            os.kill(os.getppid(), signal.SIGINT)

        signal.signal(signal.SIGINT, again)
        os.kill(os.getppid(), signal.SIGINT)
        while True:
            signal.pause()
        """
    )
    assert failure(path, num_processes=1).exit_code == 130


def test_a_killed_launcher_leaves_no_rank(script: Write) -> None:
    """Ranks end when their launcher is killed with SIGKILL."""
    path = script("print(os.getpid(), flush=True); signal.pause()")
    code = f"""
from plugframe.hooks.launcher import Job
from plugframe.launch import supervise
supervise(Job(num_processes=2, command=({path!r},)))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        try:
            pids = [int(launcher.stdout.readline()) for _ in range(2)]
        finally:
            launcher.kill()
        for pid in pids:
            wait_until_gone(pid)
    # Its guardian, or the next launcher where it was killed before it had one.
    while list(Path(os.environ["TMPDIR"]).glob("plugframe-launch-*")):
        sweep()


def test_the_folder_of_a_killed_launcher_goes_with_the_next() -> None:
    """Without a reaper the folder of a killed launcher stays, and the next launcher removes it by its lock."""
    code = """
import signal
from plugframe.launch.folder import temporary_folder
with temporary_folder() as folder:
    print(folder, flush=True)
    signal.pause()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as launcher:
        assert launcher.stdout is not None
        try:
            folder = Path(launcher.stdout.readline().strip())
            sweep()
            assert folder.exists()  # it is in use
        finally:
            launcher.kill()
    assert folder.exists()
    sweep()
    assert not folder.exists()


@pytest.mark.ranks
def test_nothing_listens_outside_loopback(script: Write) -> None:
    """Neither the launcher nor a rank with a process group listens on external interfaces."""
    from plugframe_builtins.elastic.launcher import Elastic

    path = script(
        """
        import json
        import torch
        import torch.distributed as dist

        def listening(pid):
            inodes = set()
            for fd in os.listdir(f"/proc/{pid}/fd"):
                try:
                    inodes.add(os.readlink(f"/proc/{pid}/fd/{fd}")[8:-1])
                except FileNotFoundError:
                    pass  # that of the listing itself
            found = []
            for table in ("tcp", "tcp6"):
                for line in open(f"/proc/{pid}/net/{table}").read().splitlines()[1:]:
                    fields = line.split()
                    if fields[3] == "0A" and fields[9] in inodes:
                        found.append(fields[1].split(":")[0])
            return found

        if __name__ == "__main__":
            dist.init_process_group("gloo")
            pids = torch.zeros(2, dtype=torch.int64)
            pids[dist.get_rank()] = os.getpid()
            dist.all_reduce(pids)
            if dist.get_rank() == 0:
                found = {str(pid): listening(pid) for pid in (os.getppid(), *pids.tolist())}
                json.dump([os.getppid(), pids.tolist(), found], open("found.json", "w"))
            dist.barrier()
            dist.destroy_process_group()
        """
    )
    Elastic().launcher_launch(Job(num_processes=2, command=(path,)))
    parent, pids, found = json.loads(Path("found.json").read_text())
    assert parent == os.getpid()
    assert all(found[str(pid)] for pid in (parent, *pids))
    assert {address for addresses in found.values() for address in addresses} == {"0100007F"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"command": ("gone.py",)}, "No script 'gone.py' in "),
        ({"command": ()}, "A job is either a script .command=. or a function"),
        ({"command": ("x.py",), "num_processes": 0}, "num_processes=0: must be at least 1"),
        (
            {"command": ("x.py",), "num_nodes": 2},
            "num_nodes=2 needs node 0's address: pass --main-address",
        ),
        ({"command": ("x.py",), "node_rank": 1}, "node_rank=1: must be 0 to 0"),
    ],
)
def test_a_job_that_cannot_be_is_refused(script: Write, settings: dict[str, Any], message: str) -> None:
    """The error has the setting and the correction."""
    script("", "x.py")
    with pytest.raises(UsageError, match=message):
        supervise(Job(**{"num_processes": 1, **settings}))
