"""From the command to its exit: a short run on two ranks, against raw torchrun. Whole processes, wall seconds.

python benchmarks/launch.py [--rounds 5]
"""

from __future__ import annotations

import argparse
import shutil
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
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "by_hand.py").write_text(BY_HAND)
        (Path(folder) / "lite.py").write_text(LITE)
        run = ["plugframe", "run", "--devices=2", "--accelerator=cpu", "--strategy=ddp", "lite.py"]
        candidates = {
            "torchrun": wall_seconds(["torchrun", "--standalone", "--nproc-per-node=2", "by_hand.py"], cwd=folder),
            "plugframe run": wall_seconds(run, cwd=folder),
        }
        if not shutil.which("torchrun"):
            del candidates["torchrun"]
        results = interleave(candidates, rounds=rounds)
        report("A short run on two ranks", results, unit="s", base=next(iter(results)), digits=2)


if __name__ == "__main__":
    main()
