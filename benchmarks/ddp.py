"""What DDP costs over hand-written DDP: two CPU ranks on gloo, all candidates taking turns in the same processes.

OMP_NUM_THREADS=1 plugframe run --devices=2 --accelerator=cpu benchmarks/ddp.py [--rounds 15] [--steps 200]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from plugframe import Lite
from rounds import installed, keep, machine


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def timed(model: Any, optimizer: Any, backward: Callable[[Any], Any], steps: int) -> Callable[[], float]:
    x = torch.randn(32, 256)

    def measure() -> float:
        torch.distributed.barrier()
        start = time.perf_counter()
        for _ in range(steps):
            optimizer.zero_grad()
            loss = model(x).square().mean()
            backward(loss)
            optimizer.step()
        return steps / (time.perf_counter() - start)

    return measure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--steps", type=int, default=200)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lite = Lite(accelerator="cpu", strategy="ddp", devices=2)
    lite.launch()
    model, optimizer = lite.setup(*make())
    plain, plain_optimizer = make()
    candidates = {
        "by hand": timed(DistributedDataParallel(plain), plain_optimizer, torch.Tensor.backward, options.steps),
        "plugframe": timed(model, optimizer, lite.backward, options.steps),
    }
    if installed("accelerate"):
        from accelerate import Accelerator

        accelerator = Accelerator(cpu=True)
        candidates["Accelerate"] = timed(*accelerator.prepare(*make()), accelerator.backward, options.steps)
    if installed("lightning.fabric"):
        from lightning.fabric import Fabric

        fabric = Fabric(accelerator="cpu", strategy="ddp", devices=2)
        fabric.launch()
        candidates["Fabric"] = timed(*fabric.setup(*make()), fabric.backward, options.steps)
    for measure in candidates.values():
        measure()
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(options.rounds):
        names = list(candidates)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(candidates[name]())
    if lite.is_global_zero:
        keep("DDP on two ranks", results, unit="steps/s", base="by hand")
    lite.print(machine())
    lite.print(f"\nDDP on two ranks (steps/s; medians of {options.rounds} interleaved rounds)")
    for name, values in results.items():
        ratio = statistics.median(v / b for v, b in zip(values, results["by hand"], strict=True))
        lite.print(
            f"  {name:12} {statistics.median(values):8.1f} [{min(values):.1f} … {max(values):.1f}]   ×{ratio:.3f}"
        )


if __name__ == "__main__":
    main()
