"""How long a save in the background holds up the loop, against a save that is waited for.

OMP_NUM_THREADS=1 plugframe run --devices=2 --accelerator=cpu benchmarks/async_save.py [--size-mb 500] [--rounds 9]

Each round saves once at once and once in the background, over the checkpoint of the round before, and waits for the
end in between, so that each has the disk for itself. The ranks share the tensors of a plain model; the time is that
of the slowest rank. The first rounds, which do not count, pay for memory that is used for the first time.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from plugframe import Lite
from rounds import keep, machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=500)
    parser.add_argument("--tensors", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--warmup", type=int, default=2, help="rounds that do not count")
    parser.add_argument("--folder", default=None, help="where to write; the system's temporary folder by default")
    options = parser.parse_args()
    lite = Lite(checkpoint="dcp")
    lite.launch()
    folder = lite.broadcast(tempfile.mkdtemp(dir=options.folder) if lite.is_global_zero else None)
    numel = options.size_mb * 1_000_000 // 4 // options.tensors
    state = {"model": {f"layer{index}.weight": torch.randn(numel) for index in range(options.tensors)}}
    times: dict[str, list[float]] = {"waited for": [], "in the background": [], "until it is on disk": []}
    try:
        for number in range(options.warmup + options.rounds):
            spent_s = one_round(lite, Path(folder) / "last", state)
            if number >= options.warmup:
                for name, each in zip(times, spent_s, strict=True):
                    times[name].append(each)
    finally:
        lite.barrier()
        if lite.is_global_zero:
            shutil.rmtree(folder)
    if lite.is_global_zero:
        keep(f"saving {options.size_mb} MB", times, unit="s", base="waited for")
    lite.print(machine())
    lite.print(f"\nsaving {options.size_mb} MB from {lite.world_size} ranks (seconds; {options.rounds} rounds)")
    for name, values in times.items():
        lite.print(f"  {name:20} {statistics.median(values):7.3f} [{min(values):.3f} … {max(values):.3f}]")
    ratios = [a / b for a, b in zip(times["in the background"], times["waited for"], strict=True)]
    lite.print(f"  the loop is held up for ×{statistics.median(ratios):.3f} of a save that is waited for")
    lite.teardown()


def one_round(lite: Lite, path: Path, state: dict[str, Any]) -> list[float]:
    """Save both ways; return the seconds the slowest rank was held up by each, and those until the second's end."""
    lite.barrier()
    start = time.perf_counter()
    lite.save(path, state)
    waited_s = time.perf_counter() - start
    lite.barrier()
    start = time.perf_counter()
    handle = lite.save(path, state, wait=False)
    held_s = time.perf_counter() - start
    assert handle is not None
    handle.wait()
    ended_s = time.perf_counter() - start
    slowest = lite.all_reduce(torch.tensor([waited_s, held_s, ended_s], dtype=torch.float64), reduce_op="max")
    return [float(each) for each in slowest]


if __name__ == "__main__":
    main()
