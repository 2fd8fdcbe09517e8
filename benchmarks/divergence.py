"""What it costs to know where every rank is: the ring for each call, the agreement before a collective, lockstep.

OMP_NUM_THREADS=1 plugframe run --devices=2 --accelerator=cpu benchmarks/divergence.py [--rounds 15] [--calls 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from plugframe import Lite
from plugframe.diagnostics.call_log import CallLog
from plugframe.diagnostics.instrument import RECORDED_HOOKS, record
from plugframe.diagnostics.replicas import check_in_sync, named_tensors
from rounds import machine


def ring_us(calls: int, *, kept: bool) -> Callable[[], float]:
    """Measure a hook that does nothing, called as `Lite` calls it; in time of the processor, which nobody shares."""
    hooks = SimpleNamespace(**{name: lambda **arguments: None for name in RECORDED_HOOKS})
    if kept:
        record(hooks, CallLog(), lambda error, late: None)
    hook, tensor = hooks.collective_all_reduce, torch.ones(8, 8)

    def measure() -> float:
        start = time.thread_time()
        for _ in range(100 * calls):
            hook(tensor=tensor, op="mean", group=None)
        return (time.thread_time() - start) / (100 * calls) * 1e6

    return measure


def each_us(call: Callable[[], Any], calls: int) -> Callable[[], float]:
    def measure() -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        return (time.perf_counter() - start) / calls * 1e6

    return measure


def step_of(lite: Any, width: int) -> tuple[Callable[[], None], Any, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))
    model, optimizer = lite.setup(model, torch.optim.Adam(model.parameters(), lr=0.001))
    x = torch.randn(64, width)

    def step() -> None:
        optimizer.zero_grad()
        lite.backward(model(x).square().mean())
        optimizer.step()

    return step, model, optimizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--calls", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    plain = Lite(accelerator="cpu", strategy="ddp", devices=2)
    plain.launch()
    locked = Lite(accelerator="cpu", strategy="ddp", devices=2, plugins="lockstep")
    locked.launch()
    tensor, calls = torch.ones(8, 8), options.calls
    step, model, optimizer = step_of(plain, 512)
    step()
    locked_step, *_ = step_of(locked, 512)
    named = list(named_tensors([model], [optimizer]))
    candidates = {
        "a hook that does nothing": ring_us(calls, kept=False),
        "the same, kept in the ring": ring_us(calls, kept=True),
        "torch's all_reduce": each_us(lambda: torch.distributed.all_reduce(tensor.clone()), calls),
        "lite.all_reduce": each_us(lambda: plain.all_reduce(tensor), calls),
        "lite.all_reduce, lockstep": each_us(lambda: locked.all_reduce(tensor), calls),
        "a DDP step": each_us(step, calls // 4),
        "a DDP step, lockstep": each_us(locked_step, calls // 4),
        "comparing the model (Adam)": each_us(lambda: check_in_sync(named, plain._hooks), calls // 10),
    }
    for measure in candidates.values():
        measure()
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(options.rounds):
        names = list(candidates)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(candidates[name]())
    plain.print(machine())
    size = f"the model and its state are {sum(tensor.nbytes for _, tensor in named) / 1e6:.1f} MB"
    plain.print(f"\nµs, rank 0; medians of {options.rounds} interleaved rounds; {size}")
    for name, values in results.items():
        plain.print(f"  {name:28} {statistics.median(values):9.2f} [{min(values):.2f} … {max(values):.2f}]")
    locked.teardown()
    plain.teardown()


if __name__ == "__main__":
    main()
