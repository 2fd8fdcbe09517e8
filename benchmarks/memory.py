"""How much memory a rank needs to initialise and to load a model larger than its part, over that part.

OMP_NUM_THREADS=1 plugframe run --devices=2 --accelerator=cpu benchmarks/memory.py --strategy fsdp [--million 500]

A rank may hold its part of the parameters and the largest block, and little more: the aim is at most 1.2 times that.
Measured is the highest resident memory (VmHWM of /proc/self/status) over that before the model, with the page cache
left out: first while `init_module` and `setup` give every parameter its value, then while `load` puts the values of a
checkpoint in their place.
"""

from __future__ import annotations

import argparse
import gc
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from plugframe import Lite
from rounds import machine

MIB = 2**20


class Block(nn.Module):
    """The parameters of a transformer block: 12 times the square of its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attend, self.mix = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.mix(self.attend(y)[..., : x.shape[-1]])
        out: Tensor = x + self.down(torch.relu(self.up(y)))
        return out


class Model(nn.Module):
    """Blocks in a list."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def resident(field: str) -> float:
    """Return this process's own resident memory in MiB, now (``RssAnon``) or at most since the last reset."""
    with open("/proc/self/status", encoding="ascii") as file:
        line = next(line for line in file if line.startswith(field + ":"))
    return int(line.split()[1]) / 1024


def peak(work: Callable[[], Any]) -> tuple[Any, float]:
    """Return what `work` returns, and by how many MiB resident memory rose at most."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # forgets the highest so far
    before = resident("VmRSS")
    result = work()
    return result, resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--strategy", default="fsdp")
    parser.add_argument("--million", type=int, default=500, help="parameters")
    parser.add_argument("--width", type=int, default=1024)
    options = parser.parse_args()
    torch.set_num_threads(1)
    lite = Lite(strategy=options.strategy)
    lite.launch()
    lite.barrier()  # everything that is connected once is connected
    lite.all_reduce(torch.ones(1))
    depth = round(options.million * 1e6 / (12 * options.width**2))
    sizes = [p.nbytes for p in Block(options.width).parameters()]
    block = sum(sizes) / MIB
    allowed = depth * block / lite.world_size + block

    def initialise() -> nn.Module:
        with lite.init_module(empty_init=True):
            model = Model(options.width, depth)
        return lite.setup(model)  # type: ignore[no-any-return]

    small = lite.broadcast(tempfile.mkdtemp() if lite.is_global_zero else None)
    try:
        with lite.init_module(empty_init=True):
            warm = Model(64, 2)
        lite.setup(warm)  # what is imported and connected once
        lite.save(Path(small, "warm"), {"model": warm})
        lite.load(Path(small, "warm"), {"model": warm})
        model, initialising = peak(initialise)
        lite.save(Path(small, "model"), {"model": model})
        _, loading = peak(lambda: lite.load(Path(small, "model"), {"model": model}))
    finally:
        lite.barrier()
        if lite.is_global_zero:
            shutil.rmtree(small)
    part = depth * block / lite.world_size
    worst = lite.all_gather(torch.tensor([initialising, loading])).amax(dim=0).tolist()
    lite.print(machine())
    lite.print(
        f"{depth} blocks of {block:.0f} MiB on {lite.world_size} ranks: a part is {part:.0f} MiB, with the largest "
        f"block {allowed:.0f} MiB"
    )
    lite.print(f"  initialising  {worst[0]:7.0f} MiB at most on any rank   ×{worst[0] / allowed:.2f}")
    lite.print(f"  loading       {part + worst[1]:7.0f} MiB, the part included     ×{(part + worst[1]) / allowed:.2f}")


if __name__ == "__main__":
    main()
