"""What a training step costs over the hand-written loop: one process, a tiny model, so that overhead shows.

OMP_NUM_THREADS=1 python benchmarks/step.py [--rounds 21] [--steps 1000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rounds import installed, interleave, machine, report

Step = Callable[[Any], None]


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return model, torch.optim.SGD(model.parameters(), lr=0.01)


def make_loader(steps: int) -> DataLoader[Any]:
    # No collation and one sample again and again: what is left is the loader's own cost.
    return DataLoader(TensorDataset(torch.randn(1, 8, 32).expand(steps, 8, 32)), batch_size=None)


def timed(loader: Any, step: Step, steps: int) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        for (x,) in loader:
            step(x)
        return (time.perf_counter() - start) / steps * 1e6

    return measure


def loop(model: Any, optimizer: Any, backward: Callable[[Any], Any]) -> Step:
    def step(x: Any) -> None:
        optimizer.zero_grad()
        loss = model(x).sum()
        backward(loss)
        optimizer.step()

    return step


def by_hand(steps: int) -> Callable[[], float]:
    return timed(make_loader(steps), loop(*make(), torch.Tensor.backward), steps)


def by_plugframe(steps: int) -> Callable[[], float]:
    from plugframe import Lite

    lite = Lite(accelerator="cpu", devices=1)
    model, optimizer = lite.setup(*make())
    return timed(lite.setup_dataloaders(make_loader(steps)), loop(model, optimizer, lite.backward), steps)


def by_fabric(steps: int) -> Callable[[], float]:
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=1)
    model, optimizer = fabric.setup(*make())
    return timed(fabric.setup_dataloaders(make_loader(steps)), loop(model, optimizer, fabric.backward), steps)


def by_accelerate(steps: int) -> Callable[[], float]:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model, optimizer, loader = accelerator.prepare(*make(), make_loader(steps))
    return timed(loader, loop(model, optimizer, accelerator.backward), steps)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--steps", type=int, default=1000)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(machine())
    candidates = {"by hand": by_hand(options.steps), "plugframe": by_plugframe(options.steps)}
    if installed("lightning.fabric"):
        candidates["Fabric"] = by_fabric(options.steps)
    if installed("accelerate"):
        candidates["Accelerate"] = by_accelerate(options.steps)
    report("One training step", interleave(candidates, rounds=options.rounds), unit="µs", base="by hand")


if __name__ == "__main__":
    main()
