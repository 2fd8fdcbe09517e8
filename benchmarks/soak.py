"""What grows in long runs: memory, objects, descriptors and threads, after a fifth of the time and at the end.

    python benchmarks/soak.py [PART …] [--times 0.1]

Parts: set-ups (2 000 models, optimizers and loaders in one Lite), lites (2 000 Lites, each torn down), steps (10 000
with loaders that are read again and again, and a logger), launches (50 of a function by fork, in one process), ranks
(32 of a small model on this machine).
"""

from __future__ import annotations

import argparse
import gc
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from plugframe import Lite

NUM_RANKS = 32
DATA = TensorDataset(torch.zeros(40, 2))


def train(lite: Lite) -> None:
    """Set up a model, an optimizer and a loader, make a step, and forget them."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model, optimizer = lite.setup(model, torch.optim.SGD(model.parameters(), lr=0.1))
    for (batch,) in lite.setup_dataloaders(DataLoader(DATA, batch_size=20)):
        optimizer.zero_grad()
        lite.backward(model(batch).sum())
        optimizer.step()


def set_ups(times: int) -> None:
    """Set up again and again in one Lite."""
    with Lite(accelerator="cpu", devices=1) as lite:
        repeat("set-ups", times, lambda: train(lite))


def lites(times: int) -> None:
    """Make and tear down Lites."""

    def one() -> None:
        with Lite(accelerator="cpu", devices=1) as lite:
            train(lite)

    repeat("lites", times, one)


def steps(times: int) -> None:
    """Train and evaluate epochs of ten steps, with two workers for every twentieth, and log each."""
    with Lite(accelerator="cpu", devices=1, loggers="csv") as lite:
        model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.1))
        loader, tests, workers = lite.setup_dataloaders(
            *(
                DataLoader(DATA, batch_size=4, shuffle=shuffle, num_workers=n)
                for shuffle, n in ((True, 0), (False, 0), (True, 2))
            )
        )
        done = [0]

        def epoch() -> None:
            for (batch,) in workers if done[0] % 200 == 0 else loader:
                optimizer.zero_grad()
                loss = model(batch).square().mean()
                lite.backward(loss)
                optimizer.step()
                done[0] += 1
                lite.log("loss", loss, step=done[0])
            with torch.no_grad():
                for (batch,) in tests:
                    model(batch)

        repeat("steps", times // 10, epoch, each=10)


def job(lite: Lite) -> int:
    train(lite)
    return lite.world_size


def launches(times: int) -> None:
    """Launch a function on two ranks, from one process."""
    lite = Lite(accelerator="cpu", devices=2, launcher="fork")
    repeat("launches", times, lambda: lite.launch(job))


def ranks(times: int) -> None:
    """Run a small model on 32 ranks, and look for what they leave."""
    del times
    script = "import torch, sys\nfrom soak import *\nlite = Lite(accelerator='cpu')\n[train(lite) for _ in range(5)]\n"
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.py").write_text(script)
        begun = time.monotonic()
        command = [sys.executable, "-m", "plugframe", "run", f"--devices={NUM_RANKS}", "train.py"]
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
        left = [path for path in Path("/proc").glob("[0-9]*") if _command(path).endswith(f"{folder}/train.py")]
        print(
            f"ranks: {NUM_RANKS} in {time.monotonic() - begun:.0f} s, exit code {done.returncode}, "
            f"{len(left)} processes left{done.stderr[-500:] if done.returncode else ''}"
        )


def _command(process: Path) -> str:
    try:
        return (process / "cmdline").read_text().replace("\0", " ").strip()
    except OSError:
        return ""


def repeat(name: str, times: int, do: Callable[[], Any], *, each: int = 1) -> None:
    """Do something, and print what there is after a fifth of it and at the end."""
    first = max(times // 5, 1)
    begun = time.monotonic()
    for number in range(1, times + 1):
        do()
        if number in (first, times):
            print(f"{name}: after {number * each:>6}: {there()}, {time.monotonic() - begun:.0f} s", flush=True)


def there() -> str:
    """Return what this process holds."""
    gc.collect()
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return (
        f"{pages * os.sysconf('SC_PAGE_SIZE') / 1e6:.1f} MB, {len(gc.get_objects())} objects, "
        f"{len(os.listdir('/proc/self/fd'))} descriptors, {threading.active_count()} threads"
    )


PARTS = {"set-ups": (set_ups, 2_000), "lites": (lites, 2_000), "steps": (steps, 10_000), "launches": (launches, 50)}
PARTS["ranks"] = (ranks, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"one of {', '.join(PARTS)}; all without")
    parser.add_argument("--times", type=float, default=1.0, help="a factor of how often everything is done")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    for part in args.parts or PARTS:
        if args.here:
            do, times = PARTS[part]
            do(max(int(times * args.times), 5))
            continue
        with tempfile.TemporaryDirectory() as folder:  # each in a process of its own
            command = [sys.executable, os.path.abspath(__file__), part, "--here", f"--times={args.times}"]
            done = subprocess.run(command, cwd=folder, stderr=subprocess.PIPE, text=True, check=False)
            if done.returncode:
                print(f"{part}: exit code {done.returncode}\n{done.stderr}")


if __name__ == "__main__":
    main()
