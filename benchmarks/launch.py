"""From the command to its exit: a short run, against raw torchrun. Whole processes, wall seconds.

python benchmarks/launch.py [--rounds 5] [--ranks 2 4 8]
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

from rounds import interleave, machine, report, wall_seconds

BY_HAND = """
import torch, torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
dist.init_process_group("gloo")
model = DistributedDataParallel(torch.nn.Linear(4, 4))
model(torch.ones(1, 4)).sum().backward()
dist.barrier()
dist.destroy_process_group()
"""

LITE = """
import torch
from plugframe import Lite
lite = Lite()
model = lite.setup(torch.nn.Linear(4, 4))
lite.backward(model(torch.ones(1, 4)).sum())
lite.barrier()
lite.teardown()
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "by_hand.py").write_text(BY_HAND)
        (Path(folder) / "lite.py").write_text(LITE)
        for ranks in arguments.ranks:
            measure(folder, ranks, arguments.rounds)


def measure(folder: str, ranks: int, rounds: int) -> None:
    """Print the times of both launchers with so many ranks."""
    run = ["plugframe", "run", f"--devices={ranks}", "--accelerator=cpu", "--strategy=ddp"]
    candidates = {
        "torchrun": wall_seconds(["torchrun", "--standalone", f"--nproc-per-node={ranks}", "by_hand.py"], cwd=folder),
        "plugframe run": wall_seconds([*run, "lite.py"], cwd=folder),
        "plugframe run, spawn": wall_seconds([*run, "--launcher.start-method=spawn", "lite.py"], cwd=folder),
    }
    report(f"{ranks} ranks", interleave(candidates, rounds=rounds), unit="s", base="torchrun", digits=2)


if __name__ == "__main__":
    main()
