"""What collectives of Lite cost over torch.distributed's own: two CPU ranks on gloo, small and large, nested.

OMP_NUM_THREADS=1 plugframe run --devices=2 --accelerator=cpu benchmarks/collectives.py [--rounds 15] [--calls 100]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from plugframe import Lite
from rounds import interleave, machine, report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=100)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lite = Lite(accelerator="cpu", strategy="ddp", devices=2)
    lite.launch()
    lite.barrier()
    lite.print(machine())

    def measure(call: Callable[[], Any], calls: int) -> Callable[[], float]:
        def run() -> float:
            dist.barrier()
            start_s = time.perf_counter()
            for _ in range(calls):
                call()
            return (time.perf_counter() - start_s) / calls * 1e6

        return run

    for title, numel, calls in (
        ("all_reduce of one number", 1, options.calls),
        ("all_reduce of 256 numbers", 256, options.calls),
        ("all_reduce of 4 MB", 1 << 20, max(options.calls // 20, 3)),
    ):
        tensor = torch.ones(numel)
        pair = {
            "torch.distributed": measure(lambda tensor=tensor: dist.all_reduce(tensor.clone()), calls),
            "plugframe": measure(lambda tensor=tensor: lite.all_reduce(tensor, reduce_op="sum"), calls),
        }
        show(lite, title, pair, options.rounds)
    parts = [torch.ones(8) for _ in range(8)]

    def each_part() -> None:
        for part in parts:
            dist.all_reduce(part.clone())

    nested = {"a": parts[:4], "b": {"c": tuple(parts[4:])}}
    pair = {
        "torch.distributed": measure(each_part, max(options.calls // 4, 3)),
        "plugframe": measure(lambda: lite.all_reduce(nested, reduce_op="sum"), max(options.calls // 4, 3)),
    }
    show(lite, "all_reduce of 8 tensors, nested", pair, options.rounds)
    lite.teardown()


def show(lite: Lite, title: str, pair: dict[str, Callable[[], float]], rounds: int) -> None:
    """Measure on all ranks, and report on one."""
    results = interleave(pair, rounds=rounds)
    if lite.is_global_zero:
        report(title, results, unit="µs", base="torch.distributed")


if __name__ == "__main__":
    main()
