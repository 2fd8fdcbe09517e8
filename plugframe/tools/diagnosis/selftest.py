"""A job of two ranks: collectives are right and how fast, a checkpoint comes back and how fast.

Run as ``python -m plugframe.tools.diagnosis.selftest FOLDER`` by each of its ranks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any

from plugframe.cli.shared_options import policy_variables
from plugframe.core.registry.registry import Registry
from plugframe.errors import PlugframeError, SettingError
from plugframe.tools.diagnosis.finding import Finding

AREA = "two ranks"
TIMEOUT_S = 180.0
SIZE_MB = 64
_ROUNDS = 5


def look(registry: Registry) -> Iterator[Finding]:
    """Run the job on the first accelerator that two ranks can share or divide, and say how it went."""
    accelerator = _accelerator(registry)
    if accelerator is None:
        yield Finding(AREA, "start", "note", "not run: no accelerator here has room for two ranks.")
        return
    with tempfile.TemporaryDirectory(prefix="plugframe-doctor-") as folder:
        options = [f"--accelerator={accelerator}", "--devices=2", "--strategy=auto", "--precision=auto"]
        command = [
            sys.executable,
            "-m",
            "plugframe",
            "run",
            *options,
            "-m",
            "plugframe.tools.diagnosis.selftest",
            folder,
        ]
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PLUGFRAME_")}
        environment |= policy_variables(registry.policy)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
            )
        except subprocess.TimeoutExpired:
            text = f"had not ended after {TIMEOUT_S:.0f} s; try: {' '.join(command[2:-1])} {os.curdir}"
            yield Finding(AREA, "start", "error", text)
            return
        spent_s = time.perf_counter() - started
        if done.returncode != 0:
            lines = (done.stderr or done.stdout).strip().splitlines()
            yield Finding(AREA, "start", "error", f"exit code {done.returncode}: {' / '.join(lines[-6:])}")
            return
        yield Finding(AREA, "start", "ok", f"accelerator {accelerator}, from command to exit {spent_s:.1f} s")
        with open(os.path.join(folder, "report.json")) as file:
            for name, told in json.load(file).items():
                yield Finding(AREA, name, "ok" if told["right"] else "error", told["text"], told)


def _accelerator(registry: Registry) -> str | None:
    for entry in sorted(registry.entries("accelerator"), key=lambda entry: -(_priority(registry, entry) or 0)):
        if _priority(registry, entry) is None:
            continue
        try:
            made = registry.make(entry)
            if made.accelerator_is_available() and len(made.accelerator_parse_devices(devices=2)) == 2:
                return entry.name
        except (SettingError, PlugframeError):
            continue  # it has one device, or is broken, which is reported under the plugins
    return None


def _priority(registry: Registry, entry: Any) -> int | None:
    try:
        return registry.describe(entry).priority
    except PlugframeError:
        return None


# ---------------------------------------------------------------------- on each rank


def run(folder: str) -> None:
    """Do the tests on this rank; rank 0 writes the report."""
    import torch

    from plugframe import Lite

    report: dict[str, Any] = {}
    with Lite() as lite:
        numel = SIZE_MB * 2**20 // 4
        tensor = torch.full((numel,), float(lite.global_rank + 1), device=lite.device)
        total = sum(range(1, lite.world_size + 1))
        report["all_reduce"] = _timed(
            lite, lambda: lite.all_reduce(tensor.clone(), reduce_op="sum"), lambda out: bool((out == total).all())
        )
        small = tensor[: numel // 8]
        report["all_gather"] = _timed(
            lite,
            lambda: lite.all_gather(small),
            lambda out: out[:, 0].tolist() == [float(rank + 1) for rank in range(lite.world_size)],
            size_mb=SIZE_MB / 8 * lite.world_size,
        )
        report["broadcast"] = _timed(lite, lambda: lite.broadcast(tensor.clone()), lambda out: bool((out == 1.0).all()))
        started = time.perf_counter()
        for _ in range(20):
            lite.barrier()
        report["barrier"] = {"right": True, "text": f"{(time.perf_counter() - started) / 20 * 1e6:,.0f} µs"}
        path = os.path.join(folder, "checkpoint")
        state = {"tensor": tensor.cpu(), "note": "doctor"}
        report["save"] = _timed(lite, lambda: lite.save(path, state), lambda out: True, rounds=2)
        report["load"] = _timed(
            lite,
            lambda: lite.load(path),
            lambda out: bool((out["tensor"] == 1.0).all()) and out["note"] == "doctor",
            rounds=2,
        )
        if lite.is_global_zero:
            with open(os.path.join(folder, "report.json"), "w") as file:
                json.dump(report, file)


def _timed(
    lite: Any, do: Callable[[], Any], right: Callable[[Any], bool], *, size_mb: float = SIZE_MB, rounds: int = _ROUNDS
) -> dict[str, Any]:
    """Return whether it gives the right result, and the best of some rounds."""
    best_s, good = float("inf"), True
    for _ in range(rounds):
        lite.barrier()
        started = time.perf_counter()
        result = do()
        lite.barrier()
        best_s = min(best_s, time.perf_counter() - started)
        good = good and right(result)
    mb_per_s = size_mb / best_s
    text = f"{mb_per_s:,.0f} MB/s ({size_mb:.0f} MB in {best_s * 1e3:.1f} ms)"
    return {"right": good, "text": text if good else f"gave a wrong result, at {text}", "mb_per_s": mb_per_s}


if __name__ == "__main__":
    run(sys.argv[1])
