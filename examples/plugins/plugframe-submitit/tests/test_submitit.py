"""The launcher: live output, functions by value, two nodes, and failures."""

from __future__ import annotations

import os
import signal
import stat
import sys
from pathlib import Path
from typing import Any

import pytest
from plugframe_submitit.launcher import Submitit

from plugframe.errors import RankFailedError, SettingError, UsageError
from plugframe.hooks import Job

SCRIPT = """
from plugframe import Lite
with Lite(accelerator="cpu", strategy="ddp") as lite:
    total = lite.all_reduce(lite.global_rank + 1, reduce_op="sum")
    lite.print(f"{lite.world_size} ranks, {lite._session.world.num_nodes} nodes: {int(total)}")
"""

#: Fakes of the SLURM commands that submitit uses. The two tasks of a job are processes of this host.
PROGRAMS = {
    "sbatch": """
        import os, subprocess, sys
        own = {**os.environ, "SLURM_JOB_ID": "77"}
        # Do not inherit the output of this program, which submitit reads to the end.
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        started = subprocess.Popen(["bash", sys.argv[-1]], env=own, **quiet)
        open(os.path.join(os.path.dirname(__file__), "job"), "w").write(str(started.pid))
        print("Submitted batch job 77")
    """,
    "srun": """
        import os, subprocess, sys
        words = sys.argv[1:]
        files = [words[words.index(name) + 1] for name in ("--output", "--error")]
        command = words[words.index("--error") + 2:]
        tasks = []
        for task in range(2):
            own = [file.replace("%j", "77").replace("%t", str(task)) for file in files]
            place = {"SLURM_PROCID": str(task), "SLURM_NODEID": str(task), "SLURM_LOCALID": "0", "SLURM_NTASKS": "2"}
            place |= {"SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "127.0.0.1"}
            tasks.append(subprocess.Popen(
                command, env={**os.environ, **place}, stdout=open(own[0], "a"), stderr=open(own[1], "a")
            ))
        sys.exit(max(task.wait() for task in tasks))
    """,
    "sacct": """
        import os
        pid = open(os.path.join(os.path.dirname(__file__), "job")).read()
        status = f"/proc/{pid}/stat"
        lives = os.path.exists(status) and open(status).read().rpartition(")")[2].split()[0] != "Z"
        print(f"JobID|State|NodeList\\n77|{'RUNNING' if lives else 'COMPLETED'}|127.0.0.1")
    """,
    "scontrol": """
        print("127.0.0.1")
    """,
    "scancel": "",
}


@pytest.fixture
def script(tmp_path: Path) -> str:
    """A script that prints the number of ranks."""
    path = tmp_path / "train.py"
    path.write_text(SCRIPT)
    return str(path)


def launch(tmp_path: Path, **job: Any) -> Any:
    return Submitit(folder=str(tmp_path / "jobs"), cluster="local").launcher_launch(job=Job(**job))


def test_the_output_of_a_script_is_passed_on(tmp_path: Path, script: str, capfd: pytest.CaptureFixture[str]) -> None:
    """Output of the ranks is printed without submitit's own log lines, and stays in the folder."""
    assert launch(tmp_path, num_processes=2, command=(script,)) is None
    out, err = capfd.readouterr()
    assert out.splitlines() == ["2 ranks, 1 nodes: 3"]
    assert "submitit: local job" in err
    assert "submitit INFO" not in out + err
    assert any("2 ranks" in path.read_text() for path in (tmp_path / "jobs").glob("*.out"))


def test_a_function_is_sent_by_value(tmp_path: Path) -> None:
    """A closure can be launched, and its return value is returned."""
    held = {"here": 3}
    assert launch(tmp_path, num_processes=1, function=lambda more: {**held, "more": more}, args=("there",)) == {
        "here": 3,
        "more": "there",
    }


def test_a_killed_job_raises(tmp_path: Path) -> None:
    """A killed node raises RankFailedError with the folder of the outputs."""

    def end_the_node() -> None:
        os.kill(os.getppid(), signal.SIGKILL)

    with pytest.raises(RankFailedError, match=r"submitit job \d+ ended without a result .*outputs in .*jobs"):
        launch(tmp_path, num_processes=1, function=end_the_node)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="The fake scheduler reads /proc.")
def test_two_nodes_of_slurm_are_one_job(
    tmp_path: Path, script: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """A task on each node starts its ranks, with a rendezvous at the first host of the job."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, code in PROGRAMS.items():
        lines = [line.removeprefix("        ") for line in code.splitlines()]
        (folder / name).write_text("\n".join([f"#!{sys.executable}", *lines]) + "\n")
        (folder / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    launcher = Submitit(folder=str(tmp_path / "jobs"), slurm={"partition": "big"})
    assert launcher.launcher_launch(job=Job(num_processes=1, num_nodes=2, command=(script,), timeout_s=60)) is None
    assert capfd.readouterr().out.splitlines() == ["2 ranks, 2 nodes: 3"]
    batch = "".join(path.read_text() for path in (tmp_path / "jobs").glob("*submission.sh"))
    assert all(line in batch for line in ("--partition=big", "--nodes=2", "--ntasks-per-node=1"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cluster": "cloud"}, "cluster='cloud' is not supported: use 'slurm', 'local', or leave it out"),
        ({"timeout_min": 0}, "timeout_min=0 must be a number of minutes, 1 or more"),
    ],
)
def test_a_wrong_option_is_refused(options: dict[str, Any], message: str) -> None:
    """The error states the allowed values."""
    with pytest.raises(SettingError, match=message):
        Submitit(**options)


def test_an_unsupported_job_raises_before_anything_starts(tmp_path: Path) -> None:
    """Two nodes on one host, and a function that cannot be pickled."""
    with pytest.raises(UsageError, match="cannot submit this job: LocalExecutor can use only one node"):
        launch(tmp_path, num_processes=1, num_nodes=2, command=("train.py",))
    with pytest.raises(UsageError, match="cannot send the function print to the ranks"):
        launch(tmp_path, num_processes=1, function=print, args=(sys.stdout,))
