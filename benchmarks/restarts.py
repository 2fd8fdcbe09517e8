"""How many jobs whose rank fails go on after a restart, and how long until the new ranks begin.

python benchmarks/restarts.py --runs 52
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import restart_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=52)
    args = parser.parse_args()
    seconds: dict[str, list[float]] = {cause: [] for cause in restart_cases.CAUSES}
    wrong = 0
    for number in range(args.runs):
        cause = restart_cases.CAUSES[number % len(restart_cases.CAUSES)]
        with tempfile.TemporaryDirectory() as folder:
            problems, back_s = restart_cases.check(cause, number // len(restart_cases.CAUSES) % 2, Path(folder))
        seconds[cause].append(back_s)
        if problems:
            wrong += 1
            print(f"run {number}, {cause}: {problems}", flush=True)
    print(f"{args.runs - wrong} of {args.runs} went on")
    for cause, found in seconds.items():
        print(
            f"{cause:<12} new ranks begin after {statistics.median(found):.2f} s (median), {max(found):.2f} s at most"
        )


if __name__ == "__main__":
    main()
