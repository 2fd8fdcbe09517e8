"""Run the benchmarks that compare plugframe with hand-written PyTorch, one after the other, and keep what they print.

python -m benchmarks [NAME ...] [--short] [--out FOLDER] [--page PAGE] [--trend FILE] [--wait SECONDS] [--list]

Each script interleaves its candidates round by round in one process or job. Their raw numbers, medians and ratios to
the first candidate, and how busy others kept the machine before and during each, go to FOLDER/benchmarks.json. A number
fails no run; a script that fails does, such as one whose candidates end with different losses.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # as for a script of this folder

import page  # noqa: E402 - it is beside this file

#: Names the file to which `rounds.keep` appends raw numbers.
VARIABLE = "BENCHMARK_OUT"

#: A machine is quiet if others use less than this part of one core.
QUIET = 0.1


@dataclass(frozen=True)
class Benchmark:
    """A script of this folder, its arguments in the long and in the short form, and the ranks it runs on."""

    about: str
    script: str
    long: tuple[str, ...] = ()
    short: tuple[str, ...] = ()
    ranks: int = 0

    def command(self, *, short: bool) -> list[str]:
        """Return the words to run."""
        script = str(HERE / self.script)
        head = [sys.executable, script]
        if self.ranks:
            run = ["-m", "plugframe", "run", f"--devices={self.ranks}", "--accelerator=cpu"]
            head = [sys.executable, *run, script]
        return [*head, *(self.short if short else self.long)]


BENCHMARKS = {
    "startup": Benchmark("commands and imports, CPU seconds", "startup.py", short=("--rounds", "2")),
    "launch": Benchmark("from the command to its exit", "launch.py", ("--ranks", "2", "4", "8"), ("--rounds", "2")),
    "step": Benchmark("a training step of a tiny model", "step.py", short=("--rounds", "7", "--steps", "300")),
    "step-parts": Benchmark(
        "parts of a step, and steps of many shapes", "step_parts.py", short=("--rounds", "3", "--steps", "50")
    ),
    "ddp": Benchmark("DDP on two ranks", "ddp.py", short=("--rounds", "5", "--steps", "100"), ranks=2),
    "collectives": Benchmark(
        "collectives on two ranks", "collectives.py", short=("--rounds", "5", "--calls", "40"), ranks=2
    ),
    "async-save": Benchmark(
        "how long a save in the background holds the loop",
        "async_save.py",
        short=("--size-mb", "100", "--rounds", "3", "--warmup", "1"),
        ranks=2,
    ),
    "checkpoint-io": Benchmark(
        "saving and loading", "checkpoint_io.py", short=("--size-mb", "64", "--rounds", "3", "--warmup", "1")
    ),
    "small-tensors": Benchmark(
        "saving and loading many small tensors",
        "checkpoint_io.py",
        long=("--size-mb", "10", "--tensors", "2000"),
        short=("--size-mb", "4", "--tensors", "500", "--rounds", "3", "--warmup", "1"),
    ),
    "growth": Benchmark(
        "starting, with more ranks and more plugins",
        "growth.py",
        short=("--rounds", "1", "--ranks", "1", "2", "--plugins", "0", "100"),
    ),
}


def main(words: Sequence[str] | None = None) -> int:
    """Run what was asked for, and return the exit code: 1 if a script failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", metavar="NAME", nargs="*", help="which ones; all")
    parser.add_argument("--short", action="store_true", help="small sizes and few rounds, about two minutes in all")
    parser.add_argument("--out", type=Path, default=Path("benchmark-results"), help="folder for benchmarks.json")
    parser.add_argument("--page", type=Path, help="Markdown page to write tables and plots into")
    parser.add_argument("--trend", type=Path, help="file to which a line with the ratios is appended")
    parser.add_argument("--wait", type=float, default=0.0, help="seconds to wait for a quiet machine, before each; 0")
    parser.add_argument("--list", action="store_true", help="list the names, and run nothing")
    options = parser.parse_args(words)
    unknown = [name for name in options.names if name not in BENCHMARKS]
    if unknown:
        parser.error(f"there is no benchmark {', '.join(unknown)}: choose from {', '.join(BENCHMARKS)}")
    if options.list:
        for name, benchmark in BENCHMARKS.items():
            print(f"{name:14} {benchmark.about} ({benchmark.script})")
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    results = {name: run(name, options) for name in options.names or BENCHMARKS}
    about = {"python": platform.python_version(), "cores": os.cpu_count(), "short": options.short}
    path = options.out / "benchmarks.json"
    found = {**about, "benchmarks": results}
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"\nraw numbers: {path}")
    if options.page is not None:
        page.write(options.page, found)
    line = json.dumps(trend(found))
    print(f"ratios to the first candidates: {line}")
    if options.trend is not None:
        with options.trend.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    return int(any(result["exit_code"] for result in results.values()))


def run(name: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one script; return its raw numbers, and how busy others kept the machine."""
    raw = options.out / f"{name}.jsonl"
    raw.unlink(missing_ok=True)
    busy = busy_cores()
    end_s = time.monotonic() + options.wait
    while busy is not None and busy >= QUIET and time.monotonic() < end_s:
        busy = busy_cores()
    quiet = busy is not None and busy < QUIET
    state = "the machine is quiet" if quiet else "the machine is NOT quiet"
    known = "unknown" if busy is None else f"{busy:.2f}"
    print(f"\n=== {name}: {state} (cores in use before: {known})", flush=True)
    start_s = time.monotonic()
    # Scripts start `plugframe` and `torchrun` by name: those beside this Python.
    folders = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environ = {"OMP_NUM_THREADS": "1", **os.environ, "PATH": folders, VARIABLE: str(raw.resolve())}
    ticks, own_s = _busy_ticks(), _children_s()
    exit_code = subprocess.run(BENCHMARKS[name].command(short=options.short), env=environ, check=False).returncode
    if exit_code:
        print(f"{name} failed with exit code {exit_code}", file=sys.stderr)
    seconds, after = time.monotonic() - start_s, _busy_ticks()
    others = None
    if ticks is not None and after is not None:
        others = max((after - ticks) / os.sysconf("SC_CLK_TCK") - (_children_s() - own_s), 0.0) / seconds
        quiet = quiet and others < QUIET
        print(f"others used {others:.2f} cores meanwhile" + ("" if quiet else ": the machine was NOT quiet"))
    tables = [json.loads(line) for line in raw.read_text("utf-8").splitlines()] if raw.exists() else []
    raw.unlink(missing_ok=True)
    return {
        "exit_code": exit_code,
        "quiet": quiet,
        "busy_cores_before": busy,
        "busy_cores_of_others": others,
        "seconds": round(seconds, 3),
        "tables": [
            table if "line" in table else {**table, "summary": summary(table["results"], table["base"])}
            for table in tables
        ],
    }


def trend(found: Mapping[str, Any]) -> dict[str, Any]:
    """Return what is kept of a run: when, where, whether the machine was quiet, and the ratio of each candidate."""
    benchmarks = found["benchmarks"]
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": _commit(),
        "quiet": all(each["quiet"] for each in benchmarks.values()),
        "short": found["short"],
        "ratios": {
            f"{name}: {table['title']}: {candidate}": round(row["ratio"], 3)
            for name, each in benchmarks.items()
            for table in each["tables"]
            if "line" not in table
            for candidate, row in table["summary"].items()
            if candidate != table["base"]
        },
    }


def _commit() -> str:
    try:
        command = ["git", "-C", str(HERE), "rev-parse", "--short", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def summary(results: Mapping[str, Sequence[float]], base: str) -> dict[str, dict[str, float]]:
    """Return the median and the spread of each candidate, and its median ratio to `base`, taken round by round."""
    return {
        name: {
            "median": statistics.median(values),
            "min": min(values),
            "max": max(values),
            "ratio": statistics.median(value / other for value, other in zip(values, results[base], strict=True)),
        }
        for name, values in results.items()
    }


def busy_cores(seconds: float = 1.0) -> float | None:
    """Return how many cores are in use while this process sleeps, None where ``/proc/stat`` is missing."""
    before = _busy_ticks()
    time.sleep(seconds)
    after = _busy_ticks()
    if before is None or after is None:
        return None
    return (after - before) / os.sysconf("SC_CLK_TCK") / seconds


def _children_s() -> float:
    """Return the CPU seconds of the processes that this one started and waited for."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _busy_ticks() -> int | None:
    try:
        words = Path("/proc/stat").read_text(encoding="utf-8").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, *_ = map(int, words)  # idle and waiting for a disk are not
    return user + nice + system + irq + softirq


if __name__ == "__main__":
    sys.exit(main())
