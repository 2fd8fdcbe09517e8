"""What a training step costs over the hand-written loop: one process, a tiny model, so that overhead shows.

OMP_NUM_THREADS=1 python benchmarks/step.py [--rounds 21] [--steps 1000]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from rounds import installed, interleave, machine, report

Step = Callable[[Any], None]


def make() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))
    return model, torch.optim.SGD(model.parameters(), lr=1e-6)  # the loss is a sum: it must stay finite


def make_loader(steps: int) -> DataLoader[Any]:
    # No collation and one sample again and again: what is left is the loader's own cost.
    x = torch.randn(1, 8, 32, generator=torch.Generator().manual_seed(1))
    return DataLoader(TensorDataset(x.expand(steps, 8, 32)), batch_size=None)


def timed(loader: Any, step: Step, steps: int, *, whole: bool = False, losses: Any = None) -> Callable[[], float]:
    """Return a measure of the µs of a step.

    Args:
        whole: whether the step takes the batch as it is, rather than its first part.
        losses: the step that holds the loss of the last one, if that is another function.
    """

    def measure() -> float:
        start = time.perf_counter()
        if whole:
            for batch in loader:
                step(batch)
        else:
            for (x,) in loader:
                step(x)
        return (time.perf_counter() - start) / steps * 1e6

    measure.losses = step if losses is None else losses  # type: ignore[attr-defined]
    return measure


def loop(model: Any, optimizer: Any, backward: Callable[[Any], Any], *, context: Any = None) -> Step:
    last: list[Any] = [None]

    def step(x: Any) -> None:
        optimizer.zero_grad()
        loss = model(x).sum()
        backward(loss)
        optimizer.step()
        last[0] = loss

    def step_in_context(x: Any) -> None:
        optimizer.zero_grad()
        with context():
            output = model(x)
        loss = output.float().sum()  # Lite's precision gives float32 as well
        backward(loss)
        optimizer.step()
        last[0] = loss

    found: Any = step if context is None else step_in_context
    found.last = last
    return found  # type: ignore[no-any-return]


def same_losses(title: str, candidates: Mapping[str, Any]) -> None:
    """Raise unless all candidates have done the same work: their last losses are equal.

    Raises:
        SystemExit: with the losses.
    """
    losses = {name: measure.losses.last[0].item() for name, measure in candidates.items()}
    if len(set(losses.values())) != 1:
        raise SystemExit(f"{title}: the last losses differ, so that not all have done the same work: {losses}")


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
    results = interleave(candidates, rounds=options.rounds)
    same_losses("One training step", candidates)
    report("One training step", results, unit="µs", base="by hand")


if __name__ == "__main__":
    main()
