"""Preemption: agreed by all ranks, forwarded by the launcher, restored at teardown."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import warm
from plugframe import Lite, PlugframeWarning
from plugframe.hooks.world import World
from plugframe.launch.preemption import SIGNALS, PreemptionHandler
from plugframe_builtins._shared.requeue import requeue
from ranks import run_ranks

SCRIPT = """
import os, signal, sys, torch
from torch import nn
from plugframe import Lite

lite = Lite()
lite.launch()
model = nn.Linear(2, 2)
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
kept = lite.checkpoints("kept", every_s=1000)
state = {"model": model, "optimizer": optimizer}
resumed = kept.resume(state)
step = kept.step
while step < 10_000:
    step += 1
    lite.backward(model(torch.ones(1, 2)).sum())
    optimizer.step()
    if step == 3 and not resumed and lite.global_rank == 1:
        os.kill(os.getppid(), getattr(signal, sys.argv[1]))
    if step == 5 and resumed:
        break
    if lite.should_stop:
        break
kept.save(step, state, force=True)
print(f"rank {lite.global_rank} {'resumed' if resumed else 'began'} and left", flush=True)
open(f"left-{lite.global_rank}", "w").write(str(step))
lite.teardown()
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""


def answers(world: World) -> list[bool]:
    """Call `should_stop` five times; the last rank receives a signal before the third call."""
    with Lite(accelerator="cpu", devices=world.world_size) as lite:
        found = []
        for number in range(5):
            if number == 2 and lite.global_rank == lite.world_size - 1:
                os.kill(os.getpid(), signal.SIGUSR1)
                os.kill(os.getpid(), signal.SIGTERM)
            found.append(lite.should_stop)
    assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2
    return found


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_all_ranks_stop_at_the_same_question(num_ranks: int) -> None:
    """A signal to one rank stops all ranks at the same call; handlers are restored."""
    results = run_ranks(num_ranks, answers)
    assert all(result == results[0] for result in results)
    assert results[0][:2] == [False] * 2
    assert results[0][2:] == [True] * 3


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGUSR1", 138)])
def test_a_stopped_job_saves_and_goes_on(name: str, code: int, tmp_path: Path) -> None:
    """After a signal to the launcher every rank saves and exits; the same command resumes."""
    (tmp_path / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "plugframe", "run", "--accelerator=cpu", "--devices=2", "train.py", name]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def run() -> subprocess.CompletedProcess[str]:
        return warm.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120, check=False
        )

    first = run()
    assert first.returncode == code, first.stderr
    assert first.stdout.count("began and left") == 2
    assert f"{name}: all ranks" in first.stderr
    steps = [(tmp_path / f"left-{rank}").read_text() for rank in range(2)]
    assert steps[0] == steps[1]
    second = run()
    assert second.returncode == 0, second.stderr
    assert second.stdout.count("resumed and left") == 2


def test_a_childs_signal_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A DataLoader worker forked from a rank ends on a signal, without effect on the rank."""
    stopping = PreemptionHandler()
    hooks = SimpleNamespace(collective_all_reduce=lambda tensor, op, group: tensor)
    try:
        assert not stopping.should_stop(hooks)
        ended: list[int] = []
        monkeypatch.setattr(os, "kill", lambda pid, number: ended.append(number))
        monkeypatch.setattr(os, "getpid", lambda: -1)
        stopping._handle(signal.SIGTERM, None)
        assert ended == [signal.SIGTERM]
        assert stopping.received is None
    finally:
        monkeypatch.undo()
        stopping.close()


@pytest.mark.ranks
def test_slurm_requeues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scontrol requeues the job or array task; without a job it is not called; a failure is a warning."""
    tool = tmp_path / "scontrol"
    tool.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\ntest "$2" != 13 || {{ echo no such job >&2; exit 1; }}\n'
    )
    tool.chmod(tool.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    for variable in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID", "SLURM_ARRAY_TASK_ID"):
        monkeypatch.delenv(variable, raising=False)
    assert not requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    assert requeue()
    with Lite(accelerator="cpu", devices=1, environment="local") as lite:
        assert lite.requeue()
    monkeypatch.setenv("SLURM_JOB_ID", "13")
    with pytest.warns(PlugframeWarning, match="'scontrol requeue 13' failed: no such job"):
        assert not requeue()
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "7")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert requeue()
    assert (tmp_path / "asked").read_text().splitlines() == ["requeue 12", "requeue 12", "requeue 13", "requeue 7_3"]


RESTARTED = """
import os, signal
from pathlib import Path
import torch
from plugframe import Lite

with Lite() as lite:
    lite.seed_everything(0)
    model = torch.nn.Linear(4, 1)
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    kept = lite.checkpoints("run")
    state = {"model": model, "optimizer": optimizer}
    kept.resume(state)
    for step in range(kept.step + 1, 7):
        optimizer.zero_grad()
        lite.backward(model(torch.randn(8, 4)).square().mean())
        optimizer.step()
        with open(f"steps-{lite.global_rank}", "a") as file:
            file.write(f"{step} ")
        kept.save(step, state)
        killed = Path("killed")
        if step == 3 and lite.global_rank == 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_rank_leads_to_a_restart_that_goes_on(tmp_path: Path) -> None:
    """With ``--max-restarts`` all ranks restart and resume from the last checkpoint, with an unmodified script."""
    (tmp_path / "train.py").write_text(RESTARTED)
    command = [sys.executable, "-m", "plugframe", "run", "--accelerator=cpu", "--devices=2", "--max-restarts=1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = warm.run(
        [*command, "train.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "SIGKILL" in done.stderr
    # Steps after the last complete checkpoint are repeated, and none before it.
    for rank in range(2):
        steps = [int(step) for step in (tmp_path / f"steps-{rank}").read_text().split()]
        assert steps in ([1, 2, 3, 4, 5, 6], [1, 2, 3, 4, 4, 5, 6])
