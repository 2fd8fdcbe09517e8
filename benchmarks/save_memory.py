"""How much memory saving and loading take over what the state itself takes, on the rank that takes most.

OMP_NUM_THREADS=1 python benchmarks/save_memory.py [--size-mb 512]

Each form, with each strategy, has fresh processes: a model of blocks of 16 MiB is saved, and saved again, and loaded
back into itself. Measured is the highest resident memory (VmHWM of /proc/self/status) over that before the call, with
the page cache left out. A save in the background is waited for; the first one also makes the memory for its copies. A
shard is what a rank writes. The aim for saving is a shard and 64 MB.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile

import fsspec  # type: ignore[import-untyped]
import torch
from torch import nn

from kill_during_save import FORMS, FolderStore
from memory import peak
from plugframe import Lite
from rounds import machine

_WIDTH = 2048
_MARK = "taken (MB): "
_BLOCK_MB = _WIDTH * _WIDTH * 4 / 1e6
CASES = [
    *(("single file", strategy) for strategy in ("single", "ddp", "fsdp")),
    *(("sharded", strategy) for strategy in ("single", "ddp", "fsdp")),
    *(("sharded, in the background", strategy) for strategy in ("single", "ddp", "fsdp")),
    *(("remote", strategy) for strategy in ("single", "ddp", "fsdp")),
]


def make_model(lite: Lite, depth: int) -> nn.Module:
    with lite.init_module(empty_init=True):
        blocks = nn.Sequential(*(nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(depth)))
    model: nn.Module = lite.setup(blocks)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)
    return model


def save(lite: Lite, url: str, model: nn.Module, *, wait: bool) -> None:
    handle = lite.save(url, {"model": model}) if wait else lite.save(url, {"model": model}, wait=False)
    if handle is not None:
        handle.wait()


def measure(name: str, strategy: str, size_mb: float, folder: str) -> None:
    """Be a rank; print, on rank 0, what the worst rank took, as JSON."""
    form = FORMS[name]
    fsspec.register_implementation("folder", FolderStore)
    torch.set_num_threads(1)
    lite = Lite(strategy=strategy, checkpoint=form.plugin)
    lite.launch()
    warm = make_model(lite, 1)
    for _ in range(2):  # what is imported and connected once
        save(lite, form.scheme + folder + "/warm", warm, wait=form.wait)
        lite.load(form.scheme + folder + "/warm", {"model": warm})
    model = make_model(lite, round(size_mb / _BLOCK_MB))
    url = form.scheme + folder + "/last"
    taken = []
    for work in (
        lambda: save(lite, url, model, wait=form.wait),
        lambda: save(lite, url, model, wait=form.wait),
        lambda: lite.load(url, {"model": model}),
    ):
        lite.barrier()
        taken.append(peak(work)[1] * 2**20 / 1e6)
    worst = lite.all_gather(torch.tensor(taken)).reshape(-1, len(taken)).amax(dim=0).tolist()
    if lite.is_global_zero:
        print(_MARK + json.dumps(worst), flush=True)
    lite.teardown()


def run(name: str, strategy: str, options: argparse.Namespace) -> list[float]:
    """Start the ranks of one case and return what they print."""
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        ranks = "1" if strategy == "single" else "2"
        case = ["--case", name, strategy, folder, "--size-mb", str(options.size_mb)]
        command = ["plugframe", "run", f"--devices={ranks}", "--accelerator=cpu", __file__, *case]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, "-m", *command], check=True, stdout=subprocess.PIPE, text=True, env=environment
        )
    answer = next(text for text in done.stdout.splitlines() if _MARK in text)
    taken: list[float] = json.loads(answer.partition(_MARK)[2])
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size-mb", type=float, default=512)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints are")
    parser.add_argument("--form", action="append", choices=FORMS, help="by default all")
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, strategy, folder = options.case
        measure(name, strategy, options.size_mb, folder)
        return
    print(machine())
    print(f"a state of {options.size_mb:g} MB; MB over it, on the rank that takes most")
    print(f"{'form':28}{'strategy':10}{'ranks':>6}{'shard':>8}{'save':>8}{'again':>8}{'load':>8}")
    for name, strategy in CASES:
        if options.form and name not in options.form:
            continue
        num_ranks = 1 if strategy == "single" else 2
        shard_mb = options.size_mb / (1 if name == "single file" else num_ranks)
        taken = "".join(f"{each:>8.0f}" for each in run(name, strategy, options))
        print(f"{name:28}{strategy:10}{num_ranks:>6}{shard_mb:>8.0f}{taken}", flush=True)


if __name__ == "__main__":
    main()
