"""Interleaved rounds: the candidates take turns, so that a machine that speeds up or slows down does so for all."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def interleave(candidates: Mapping[str, Callable[[], float]], *, rounds: int) -> dict[str, list[float]]:
    """Call every candidate once per round, after one round that is not counted; return what each gave."""
    for measure in candidates.values():
        measure()
    results: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds):
        names = list(candidates)
        # Whoever goes first after another's garbage pays for it: the order turns.
        for name in names[number % len(names) :] + names[: number % len(names)]:
            results[name].append(candidates[name]())
    return results


def report(
    title: str, results: Mapping[str, Sequence[float]], *, unit: str, base: str, digits: int = 1
) -> dict[str, float]:
    """Print medians, and differences and ratios to `base` taken round by round; keep the raw numbers.

    Returns:
        The median difference of each candidate to `base`.
    """
    medians: dict[str, float] = {}
    keep(title, results, unit=unit, base=base)
    print(f"\n{title} ({unit}; medians of {len(results[base])} interleaved rounds, [min … max])")
    for name, values in results.items():
        line = f"  {name:32} {statistics.median(values):10.{digits}f}"
        line += f" [{min(values):.{digits}f} … {max(values):.{digits}f}]"
        if name != base:
            differences = [value - other for value, other in zip(values, results[base], strict=True)]
            ratios = [value / other for value, other in zip(values, results[base], strict=True)]
            medians[name] = statistics.median(differences)
            line += f"   {medians[name]:+.{digits}f}   ×{statistics.median(ratios):.3f}"
        print(line)
    return medians


def fitted(what: str, costs: Mapping[int, float], unit: str) -> str:
    """Return the line fitted to costs by number, in words, and keep it."""
    slope, start = statistics.linear_regression(list(costs), list(costs.values()))
    text = f"over {what}: {start:+.2f} {unit} {slope:+.4f} {unit} each"
    _append({"line": f"{what} {', '.join(map(str, costs))}", "text": text, "start": start, "slope": slope})
    return f"\n{text}"


def keep(title: str, results: Mapping[str, Sequence[float]], *, unit: str, base: str) -> None:
    """Append raw numbers to the file of ``python -m benchmarks``, if that runs this script."""
    _append({"title": title, "unit": unit, "base": base, "machine": machine(), "results": dict(results)})


def _append(kept: Mapping[str, Any]) -> None:
    path = os.environ.get("BENCHMARK_OUT")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(kept) + "\n")


def machine() -> str:
    """Describe the machine in one line."""
    model = next((line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")), "")
    import torch

    cores = os.cpu_count()
    return (
        f"{model or platform.machine()}, {cores} cores, Python {platform.python_version()}, torch {torch.__version__}"
    )


def _cpuinfo() -> list[str]:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return file.read().splitlines()
    except OSError:
        return []


def cpu_seconds(command: Sequence[str]) -> Callable[[], float]:
    """Return a measure of the CPU seconds (user and system) a command takes, its children included."""

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return measure


def wall_seconds(command: Sequence[str], *, cwd: str | None = None) -> Callable[[], float]:
    """Return a measure of the seconds a command takes from start to exit."""

    def measure() -> float:
        start = time.perf_counter()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, cwd=cwd)
        return time.perf_counter() - start

    return measure


def installed(*modules: str) -> bool:
    """Say whether modules can be imported, without importing them."""
    import importlib.util

    try:
        return all(importlib.util.find_spec(module) is not None for module in modules)
    except ModuleNotFoundError:
        return False


def python(code: str) -> list[str]:
    """Return the command that runs a piece of Python."""
    return [sys.executable, "-c", code]
