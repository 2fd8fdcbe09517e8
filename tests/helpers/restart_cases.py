"""Jobs whose rank fails once and that are started again: for the tests, and for many of them in a script."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import warm

CAUSES = ("exception", "SIGKILL", "hang", "hard exit")
#: Seconds a collective may take in these jobs.
TIMEOUT_S = 4.0

SCRIPT = """
import os, signal, sys, time
begun = time.time()
import torch
from plugframe import Lite

CAUSE, CULPRIT = sys.argv[1], int(sys.argv[2])
lite = Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=TIMEOUT)
lite.launch()
first = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
model = torch.nn.Linear(4, 1)
model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
state = {"model": model, "optimizer": optimizer}
kept = lite.checkpoints("kept", keep_last=2)
kept.resume(state)
if not first and lite.is_global_zero:
    with open("resumed", "w") as file:
        file.write(f"{kept.step} {begun} {time.time()}")
for step in range(kept.step + 1, 7):
    lite.backward(model(torch.ones(2, 4)).square().mean())
    optimizer.step()
    optimizer.zero_grad()
    kept.save(step, state)
    if first and step == 3 and lite.global_rank == CULPRIT:
        with open("fault", "w") as file:
            file.write(str(time.time()))
        if CAUSE == "exception": raise ValueError("out of paper")
        if CAUSE == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
        if CAUSE == "hang": signal.pause()
        if CAUSE == "hard exit": os._exit(7)
lite.teardown()
""".replace("TIMEOUT", str(TIMEOUT_S))


def check(cause: str, culprit: int, folder: Path) -> tuple[str, float]:
    """Run a job; return what is wrong, nothing if all is well, and the seconds from the fault to the new ranks."""
    (folder / "train.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "plugframe", "run", "--devices=2", "--max-restarts=1", "train.py"]
    done = warm.run(
        [*command, cause, str(culprit)],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    problems = [] if done.returncode == 0 else [f"exit code {done.returncode}"]
    told = [line for line in done.stderr.splitlines() if "restart" in line]
    if len(told) != 1 or not re.search(r"; restart 1 of 1$", told[0]):
        problems.append(f"it says {told}")
    if not (folder / "resumed").exists():
        return f"it was not started again\n{done.stderr}", 0.0
    step, begun, _ = (folder / "resumed").read_text().split()
    if step not in ("2", "3"):
        problems.append(f"it went on from step {step}")
    noticed = float((folder / "fault").read_text()) + (TIMEOUT_S if cause == "hang" else 0.0)
    return "; ".join(problems) + (f"\n{done.stderr}" if problems else ""), float(begun) - noticed
