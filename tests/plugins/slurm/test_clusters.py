"""A real SLURM, of hosts that are namespaces of this machine, and a real mpirun, where they are installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import slurm
from paths import EXAMPLES

pytest.importorskip("sklearn")

EXAMPLE = EXAMPLES / "image_classifier" / "train_lite.py"
MPIRUN = ("mpirun", "-np", "2", "--allow-run-as-root", "--oversubscribe")
needs_mpirun = pytest.mark.skipif(shutil.which("mpirun") is None, reason="there is no mpirun (Debian: openmpi-bin)")

#: Trains until it is told to stop, saves, and asks to be started again; the second time it only says where it is.
PREEMPTED = """
import os, time
import torch
from plugframe import Lite

lite = Lite(accelerator="cpu", strategy="ddp")
model = torch.nn.Linear(2, 1)
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
state = {"model": model, "optimizer": optimizer}
kept = lite.checkpoints("run", keep_last=1)
resumed = kept.resume(state)
step = kept.step
print(f"rank {lite.global_rank} begins after step {step}", flush=True)
while not resumed:
    step += 1
    lite.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    optimizer.zero_grad()
    stop = lite.should_stop
    open(f"ready-{lite.global_rank}", "w").close()
    if stop:
        kept.save(step, state, force=True)
        print(f"rank {lite.global_rank} stops after step {step}", flush=True)
        lite.requeue()
        break
"""
BATCH = f"""#!/bin/sh
#SBATCH --nodes=2 --ntasks-per-node=1 --requeue --output=said --open-mode=append
srun {sys.executable} train.py
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[slurm.Slurm]:
    """Give a SLURM with two nodes."""
    if why_not := slurm.missing():
        pytest.skip(why_not)
    with slurm.slurm(nodes=2) as made:
        yield made


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PLUGFRAME_VERBOSE", "1")  # the line at the start then names the environment


def check_example(said: str, environment: str) -> None:
    """Two ranks have trained as one job: one of them speaks, and the accuracy is that of a job."""
    assert said.count("plugframe: 2 ranks, ") == 1
    assert f"environment {environment} (plugframe" in said
    assert said.count("\ntest accuracy: ") == 1
    assert float(said.rpartition("test accuracy: ")[2].split()[0]) > 50.0, said


def test_srun_starts_the_main_example(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """One task on each of two nodes is one job of two ranks; nothing else is started."""
    command = (sys.executable, str(EXAMPLE), "--epochs", "1")
    code, said = cluster.run("srun", "--nodes=2", "--ntasks=2", *command, cwd=tmp_path)
    assert code == 0, said
    check_example(said, "slurm")


def test_srun_of_another_size_is_told(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """What the script asks for and what SLURM has started are compared on every rank."""
    (tmp_path / "train.py").write_text("from plugframe import Lite\nLite(accelerator='cpu', devices=3, num_nodes=2)\n")
    code, said = cluster.run("srun", "--nodes=2", "--ntasks=2", sys.executable, "train.py", cwd=tmp_path)
    assert code != 0
    assert said.count("3 processes on each node were asked for, SLURM started 1") == 2


def test_a_batch_job_is_warned_saves_and_is_started_again(cluster: slurm.Slurm, tmp_path: Path) -> None:
    """SIGUSR1 ends the loop of both ranks after one step; SLURM starts the job again, and it goes on from there."""
    (tmp_path / "train.py").write_text(PREEMPTED)
    (tmp_path / "batch").write_text(BATCH)
    code, job = cluster.run("sbatch", "--parsable", "batch", cwd=tmp_path)
    assert code == 0, job
    said = tmp_path / "said"
    wait_for(lambda: len(list(tmp_path.glob("ready-*"))) == 2, said)
    assert cluster.run("scancel", "--signal=USR1", job.strip(), cwd=tmp_path) == (0, "")
    wait_for(lambda: "JobState=COMPLETED" in cluster.run("scontrol", "show", "job", job.strip(), cwd=tmp_path)[1], said)
    lines = sorted(line for line in said.read_text().splitlines() if line.startswith("rank "))
    step = int(lines[2].rpartition(" ")[2] if "stops" in lines[2] else lines[1].rpartition(" ")[2])
    ends = (f"begins after step {step}", "begins after step 0", f"stops after step {step}")
    assert lines == sorted(f"rank {rank} {end}" for rank in (0, 1) for end in ends), said.read_text()


@needs_mpirun
def test_mpirun_starts_the_main_example(tmp_path: Path) -> None:
    """Two processes of mpirun are one job of two ranks; nothing else is started."""
    done = mpirun(tmp_path, str(EXAMPLE), "--epochs", "1")
    assert done.returncode == 0, done.stdout
    check_example(done.stdout, "mpi")


@needs_mpirun
def test_mpirun_of_another_size_is_told(tmp_path: Path) -> None:
    """What the script asks for and what mpirun has started are compared on every rank."""
    done = mpirun(tmp_path, "-c", "from plugframe import Lite; Lite(accelerator='cpu', devices=3)")
    assert done.returncode != 0
    assert "3 processes on each node were asked for, MPI started 2" in done.stdout, done.stdout


def mpirun(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    # Open MPI puts sockets below the temporary folder, whose path must be short.
    environment = {**os.environ, "TMPDIR": "/tmp"}
    return subprocess.run(
        [*MPIRUN, sys.executable, *words],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=180,
        check=False,
    )


def wait_for(condition: Callable[[], bool], said: Path) -> None:
    until = time.monotonic() + 150.0
    while not condition():
        assert time.monotonic() < until, said.read_text() if said.exists() else "nothing was said"
        time.sleep(0.3)
