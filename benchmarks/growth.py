"""How starting grows: with the number of ranks on a node, and with installed plugins; a line for each, and larger jobs.

python benchmarks/growth.py [--rounds 3] [--ranks 1 2 4 8] [--plugins 0 100 300]
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from pathlib import Path

from launch import LITE
from rounds import cpu_seconds, fitted, interleave, machine, report, wall_seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--plugins", type=int, nargs="+", default=[0, 100, 300])
    options = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        script = Path(folder) / "train.py"
        script.write_text(LITE, encoding="utf-8")
        commands = {
            number: ["plugframe", "run", str(script), f"--devices={number}", "--accelerator=cpu"]
            for number in options.ranks
        }
        wall = {f"{number} ranks": wall_seconds(command, cwd=folder) for number, command in commands.items()}
        results = interleave(wall, rounds=options.rounds)
        report("From the command to its exit", results, unit="s", base=f"{options.ranks[0]} ranks", digits=2)
        medians = {number: statistics.median(results[f"{number} ranks"]) for number in options.ranks}
        print(fitted("ranks on a node", medians, "s"))
        on_paper(medians)
        listings(Path(folder), options.plugins, options.rounds)


def on_paper(medians: dict[int, float]) -> None:
    """Print what starts of 64 and 1 024 ranks take by the fitted line, with the terms named.

    The term of a node comes from the line. Nodes start at the same time, and each rank registers once with the store
    of rank 0, which answers one after the other: 0.2 ms each, an assumption that no job of one machine can measure.
    """
    if len(medians) < 2:
        return
    slope, start_s = statistics.linear_regression(list(medians), list(medians.values()))
    for ranks in (64, 1024):
        node_s, store_s = start_s + 8 * slope, ranks * 0.2e-3
        print(
            f"on paper, {ranks} ranks on {ranks // 8} nodes with as many cores a rank: {start_s:.2f} s (command and "
            f"imports) + {8 * slope:.2f} s (8 ranks on a node) + {store_s:.2f} s (store, assumed) = "
            f"{node_s + store_s:.2f} s"
        )


def listings(folder: Path, numbers: list[int], rounds: int) -> None:
    """Measure `plugframe list-plugins` with more packages installed."""
    measures = {}
    for number in numbers:
        site = folder / f"site{number}"
        for index in range(number):
            info = site / f"many_{index}-1.0.dist-info"
            info.mkdir(parents=True)
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: many-{index}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(f"[plugframe.logger]\nmany{index} = many_{index}:plugin\n")
        path = os.pathsep.join(filter(None, [str(site), os.environ.get("PYTHONPATH", "")]))
        measures[f"{number} plugins more"] = cpu_seconds(["env", f"PYTHONPATH={path}", "plugframe", "list-plugins"])
    results = interleave(measures, rounds=max(rounds, 5))
    report("plugframe list-plugins", results, unit="s CPU", base=f"{numbers[0]} plugins more", digits=3)
    if len(numbers) > 1:
        medians = {number: 1e3 * statistics.median(results[f"{number} plugins more"]) for number in numbers}
        print(fitted("installed plugins", medians, "ms"))


if __name__ == "__main__":
    main()
