"""What it costs that many other plugins are installed: a listing and `Lite()`, with 10 and with 300 of them.

Every plugin is a distribution of its own (metadata, a package, a light descriptor) in one folder, as in site-packages,
and the kinds take turns. CPU seconds of whole processes, and of `Lite()` alone within one.

python benchmarks/many_plugins.py [--few 10] [--many 300] [--rounds 10]
"""

from __future__ import annotations

import argparse
import compileall
import os
import resource
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from rounds import interleave, machine, report

KINDS = (
    "accelerator",
    "strategy",
    "precision",
    "collective",
    "checkpoint",
    "environment",
    "launcher",
    "logger",
    "extension",
)
DESCRIPTOR = """from plugframe import Plugin

plugin = Plugin(factory="{module}.implementation:Thing", summary="A plugin among many.")
"""
CONSTRUCT = """
import sys, time
import torch
from plugframe import Lite

{before}
start = time.process_time()
Lite(devices=1)
print(time.process_time() - start)
"""
#: One `Lite` before the one that is timed: what is left is the cost of every further one.
AGAIN = "Lite(devices=1)"


def install(folder: Path, count: int) -> None:
    """Write `count` distributions with one plugin each, as pip would leave them."""
    for number in range(count):
        kind = KINDS[number % len(KINDS)]
        name, module = f"many-{kind}-{number}", f"many_{kind}_{number}"
        about = folder / f"{module}-1.{number}.dist-info"
        about.mkdir()
        (about / "METADATA").write_text(
            f"Metadata-Version: 2.4\nName: {name}\nVersion: 1.{number}\nSummary: A plugin among many.\n"
            f"Requires-Python: >=3.10\nRequires-Dist: plugframe\n\n{'What its README says. ' * 100}\n"
        )
        (about / "entry_points.txt").write_text(f"[plugframe.{kind}]\nmany{number} = {module}:plugin\n")
        package = folder / module
        package.mkdir()
        (package / "__init__.py").write_text(DESCRIPTOR.format(module=module))
    compileall.compile_dir(folder, quiet=1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--few", type=int, default=10)
    parser.add_argument("--many", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    print(machine())
    root = Path(tempfile.mkdtemp(prefix="many-plugins-"))
    try:
        folders = {}
        for count in (options.few, options.many):
            folders[count] = root / str(count)
            folders[count].mkdir()
            install(folders[count], count)
        plugframe = shutil.which("plugframe") or "plugframe"
        for title, command in {
            "plugframe list-plugins": [plugframe, "list-plugins"],
            "plugframe list-plugins --check": [plugframe, "list-plugins", "--check"],
            "a process that makes a Lite": [sys.executable, "-c", CONSTRUCT.format(before="")],
        }.items():
            measures = {f"{count} plugins": _whole(command, folder) for count, folder in folders.items()}
            report(
                title,
                interleave(measures, rounds=options.rounds),
                unit="s CPU",
                base=f"{options.few} plugins",
                digits=3,
            )
        for title, before in {"Lite(), the first of a process": "", "Lite(), a further one": AGAIN}.items():
            code = CONSTRUCT.format(before=before)
            measures = {f"{count} plugins": _printed(code, folder) for count, folder in folders.items()}
            report(
                title,
                interleave(measures, rounds=options.rounds),
                unit="s CPU",
                base=f"{options.few} plugins",
                digits=4,
            )
    finally:
        shutil.rmtree(root)


def _environ(folder: Path) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}


def _whole(command: list[str], folder: Path) -> Callable[[], float]:
    """Return a measure of the CPU seconds of a command among the plugins of `folder`."""

    def measure() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=_environ(folder), cwd=folder)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    return measure


def _printed(code: str, folder: Path) -> Callable[[], float]:
    """Return a measure that a process takes itself, and prints."""

    def measure() -> float:
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=_environ(folder), cwd=folder)
        return float(done.stdout.split()[-1])

    return measure


if __name__ == "__main__":
    main()
