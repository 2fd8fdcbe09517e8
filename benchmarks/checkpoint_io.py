"""How long saving and loading take, against ``torch.save`` followed by fsync, and ``torch.load``.

    python benchmarks/checkpoint_io.py --size-mb 1024 --tensors 64 --rounds 7

The two take turns within each round, so that a busy disk or processor meets both alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch

from plugframe.context import Context
from plugframe.world import World
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint


def make_plugin() -> SafetensorsCheckpoint:
    hooks = SimpleNamespace(collective_broadcast_object=lambda obj, src, group: obj)
    plugin = SafetensorsCheckpoint()
    plugin.checkpoint_setup(Context(world=World(), device=torch.device("cpu"), hooks=hooks, names={}))
    return plugin


def torch_save(state: dict[str, Any], path: str) -> None:
    torch.save(state, path)
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def timed(fn: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    result = fn()
    spent_s = time.perf_counter() - start_s
    del result
    return spent_s


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=int, default=256)
    parser.add_argument("--tensors", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warmup", type=int, default=3, help="rounds that do not count")
    parser.add_argument("--folder", default=None, help="where to write; the system's temporary folder by default")
    args = parser.parse_args()

    numel = args.size_mb * 1024 * 1024 // 4 // args.tensors
    state = {
        "model": {f"layer{index}.weight": torch.randn(numel) for index in range(args.tensors)},
        "epoch": 3,
    }
    plugin = make_plugin()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        ours, theirs = os.path.join(folder, "ours.ckpt"), os.path.join(folder, "theirs.pt")
        ways: dict[str, Callable[[], object]] = {
            "torch.save + fsync": lambda: torch_save(state, theirs),
            "plugframe save": lambda: plugin.checkpoint_save(path=ours, state=state, info={}, wait=True),
            "torch.load": lambda: torch.load(theirs, weights_only=True),
            "plugframe load": lambda: plugin.checkpoint_load(path=ours, weights_only=None),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        # The first rounds pay for memory this process, or the virtual machine, has not touched before.
        for number in range(args.warmup + args.rounds):
            for name, way in ways.items():
                spent_s = timed(way)
                if number >= args.warmup:
                    times[name].append(spent_s)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"{args.size_mb} MB in {args.tensors} tensors, {args.rounds} rounds, {os.cpu_count()} cores; seconds")
    for name, spent in times.items():
        print(f"{name:20s} median {medians[name]:.3f}   {' '.join(f'{each:.3f}' for each in spent)}")
    print(f"save ratio {medians['plugframe save'] / medians['torch.save + fsync']:.2f}")
    print(f"load ratio {medians['plugframe load'] / medians['torch.load']:.2f}")


if __name__ == "__main__":
    main()
