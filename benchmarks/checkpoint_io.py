"""How long saving and loading take, against ``torch.save`` with fsync, in place and renamed, and ``torch.load``.

    python benchmarks/checkpoint_io.py --size-mb 1024 --tensors 64 --rounds 7

All take turns within each round, in an order that changes, so that a busy disk or processor meets them alike.
In place is what ``torch.save(state, "last.pt")`` does: a crash loses the old file. ``torch.load`` verifies nothing.
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

from plugframe.hooks.context import Context
from plugframe.hooks.world import World
from plugframe_builtins.safetensors_checkpoint.checkpoint import SafetensorsCheckpoint
from rounds import keep


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


def torch_save_renamed(state: dict[str, Any], path: str) -> None:
    torch_save(state, f"{path}.tmp")
    os.replace(f"{path}.tmp", path)


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
            "torch.save in place": lambda: torch_save(state, theirs),
            "torch.save renamed": lambda: torch_save_renamed(state, f"{theirs}2"),
            "plugframe save": lambda: plugin.checkpoint_save(path=ours, state=state, info={}, wait=True),
            "torch.load": lambda: torch.load(theirs, weights_only=True),
            "plugframe load": lambda: plugin.checkpoint_load(path=ours, trusted=False, lazy=False),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        order = list(ways)
        # The first rounds pay for memory this process, or the virtual machine, has not touched before.
        for number in range(args.warmup + args.rounds):
            for name in order:
                spent_s = timed(ways[name])
                if number >= args.warmup:
                    times[name].append(spent_s)
            # The loads stay last: in the first round there is nothing to load yet.
            order = [*order[1:3], order[0], *order[:2:-1]]
    for title, base in (("save", "torch.save in place"), ("load", "torch.load")):
        keep(f"{title} {args.size_mb} MB", {n: t for n, t in times.items() if title in n}, unit="s", base=base)
    medians = {name: statistics.median(spent) for name, spent in times.items()}
    print(f"{args.size_mb} MB in {args.tensors} tensors, {args.rounds} rounds, {os.cpu_count()} cores; seconds")
    for name, spent in times.items():
        rounds = " ".join(f"{each:.3f}" for each in spent)
        print(f"{name:20s} median {medians[name]:.3f}  fastest {min(spent):.3f}  ({rounds})")
    for ours_name, theirs_name in (
        ("plugframe save", "torch.save in place"),
        ("plugframe save", "torch.save renamed"),
        ("plugframe load", "torch.load"),
    ):
        median = medians[ours_name] / medians[theirs_name]
        fastest = min(times[ours_name]) / min(times[theirs_name])
        print(f"{ours_name} / {theirs_name}: median {median:.2f}, fastest {fastest:.2f}")


if __name__ == "__main__":
    main()
