"""Programs that a rank starts are not ranks, however they are started; launchers inside a rank still start ranks."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from plugframe import Lite
from plugframe.hooks.variables import RANK
from plugframe.launch.inheritance import RankEnvironment

#: What a rank starts. It leaves what its Lite has to say in a file: world size and rank.
CHILD = """
import os, sys
from plugframe import Lite

def say(name, lite):
    lite.barrier()
    with open(f"said-{name}", "a") as file:
        file.write(f"{lite.world_size}:{lite.global_rank}:{'RANK' in os.environ} ")

if __name__ == "__main__":
    say(sys.argv[1], Lite(accelerator="cpu"))
"""
TRAIN = """
import multiprocessing, os, subprocess, sys
from plugframe import Lite
from plugframe.errors import OrderError
import child

def helps(lite):
    try:
        lite.barrier()
    except OrderError as error:
        with open("said-sent", "a") as file:
            file.write(f"{lite.world_size}:{lite.global_rank}:{'helper' in str(error)} ")
    child.say("spawned", Lite(accelerator="cpu"))

if __name__ == "__main__":
    lite = Lite(accelerator="cpu")
    how, python, last = sys.argv[1], [sys.executable], lite.global_rank == lite.world_size - 1
    if last:
        changed = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        subprocess.run([*python, "child.py", "constructed"], env=changed, check=True)
    lite.barrier()
    if last and how == "plugframe run":
        process = multiprocessing.get_context("spawn").Process(target=helps, args=(lite,))
        process.start()
        torchrun = [*python, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        subprocess.run([*torchrun, "child.py", "torchrun"], check=True)
        process.join()
        assert process.exitcode == 0
    lite.teardown()
    assert "PLUGFRAME_RANK" not in os.environ
    if last and how == "plugframe run":
        subprocess.run([*python, "child.py", "torn down"], check=True)
    if last and how == "torchrun":
        given = {"env": dict(os.environ), "capture_output": True, "text": True}
        done = subprocess.run([*python, "child.py", "copied"], **given)
        assert f"Rank 1 of this job is process {os.getpid()}" in done.stderr, done.stderr
    with open("said-ranks", "a") as file:
        file.write(f"{lite.world_size}:{lite.global_rank}:{'RANK' in os.environ} ")
"""
ALONE = ["1:0:False"]
RANKS = ["2:0:True", "2:1:True"]
SAID = {
    "plugframe run": {
        **dict.fromkeys(("constructed", "spawned", "torn down"), ALONE),
        **dict.fromkeys(("ranks", "torchrun"), RANKS),
        "sent": RANKS[1:],
    },
    "torchrun": {"constructed": ALONE, "ranks": RANKS},
}
#: The second by a wrapper that starts the script as a process of its own: that one is the rank.
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python"]
HOWS = {
    "plugframe run": [sys.executable, "-m", "plugframe", "run", "--devices=2", "--strategy=ddp", "train.py"],
    "torchrun": [*TORCHRUN, "sh", "-c", f'{sys.executable} train.py "$0"; exit $?'],
}


@pytest.mark.parametrize("how", HOWS)
def test_a_program_of_a_rank_runs_by_itself(how: str, tmp_path: Path) -> None:
    """Programs started by subprocess and spawn, in setup and after teardown, are alone; a launcher makes ranks."""
    (tmp_path / "child.py").write_text(CHILD)
    (tmp_path / "train.py").write_text(TRAIN)
    (tmp_path / "temporary").mkdir()  # torchrun leaves a folder there
    done = subprocess.run(
        [*HOWS[how], how],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path / "temporary")},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {path.name.removeprefix("said-"): sorted(path.read_text().split()) for path in tmp_path.glob("said-*")}
    assert said == SAID[how]
    assert done.stderr.count("runs independently") == list(said.values()).count(ALONE)


def parent_rank(monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Make this process look like a program that rank 1 of a job of two has started, by another process id."""
    place = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29501"}
    step = {"SLURM_JOB_ID": "7", "SLURM_STEP_ID": "0", "SLURM_PROCID": "1", "SLURM_NTASKS": "2", "ENVIRONMENT": "BATCH"}
    settings = {
        "PLUGFRAME_STRATEGY": "ddp",
        "PLUGFRAME_STRATEGY__TIMEOUT_S": "9",
        "PLUGFRAME_DEVICES": "2",
        "PLUGFRAME_FROM_COMMAND_LINE": "strategy,devices,--strategy.timeout-s",
        "PLUGFRAME_PRECISION": "bf16",  # by hand
    }
    for name, value in {**place, **step, **settings}.items():
        monkeypatch.setenv(name, value)
    RankEnvironment().claim([tuple(place), [name for name in step if name.startswith("SLURM_")]])
    mark = json.loads(os.environ.pop(RANK))
    os.unsetenv(RANK)
    monkeypatch.setenv(RANK, json.dumps({**mark, "pid": mark["pid"] + 1}))
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_only_what_belongs_to_the_rank_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Variables the user has exported are kept in the program; all variables are restored after teardown."""
    parent_rank(monkeypatch)
    before = dict(os.environ)
    with Lite(accelerator="cpu") as lite:
        lite.barrier()
        assert (lite.world_size, lite.plan.choices["precision"].name) == (1, "bf16-mixed")
        assert not {"RANK", "SLURM_PROCID", "PLUGFRAME_STRATEGY", "PLUGFRAME_STRATEGY__TIMEOUT_S"} & set(os.environ)
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({"MASTER_PORT": "29502", "LOCAL_WORLD_SIZE": "2"}, "torchelastic"),
        (
            {
                "SLURM_STEP_ID": "1",
                "SLURM_LOCALID": "1",
                "SLURM_NODEID": "0",
                "SLURM_NNODES": "1",
                "SLURM_STEP_TASKS_PER_NODE": "2",
            },
            "slurm",
        ),
        (
            {
                "OMPI_COMM_WORLD_RANK": "1",
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
                "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
            },
            "mpi",
        ),
    ],
)
def test_a_launcher_that_runs_again_makes_ranks(
    monkeypatch: pytest.MonkeyPatch, variables: dict[str, str], found: str
) -> None:
    """A launcher that has set its variables again counts, even if the rank above had the same launcher or another."""
    parent_rank(monkeypatch, **variables)
    lite = Lite(accelerator="cpu")
    assert (lite.world_size, lite.global_rank, lite.plan.choices["environment"].name) == (2, 1, found)
    assert json.loads(os.environ[RANK])["pid"] == os.getpid()
    lite.teardown()
    assert json.loads(os.environ[RANK])["pid"] == os.getpid() + 1


def test_each_of_two_lites_leaves_the_mark_to_the_other(fake_cluster: Callable[..., Any]) -> None:
    """A process is a rank while one of its Lites exists, also if one was garbage-collected without teardown."""
    fake_cluster(num_nodes=1, ranks_per_node=2, rank=1)
    first, second = Lite(accelerator="cpu"), Lite(accelerator="cpu")
    first.teardown()
    first.teardown()
    assert RANK in os.environ
    del second
    gc.collect()
    assert RANK not in os.environ
