"""What is said when a rank fails, in every way, on every rank, under every launcher, and how soon everybody is gone.

    python benchmarks/failures.py [--how "plugframe run"]

The cases are those of ``tests/helpers/failure_cases.py``; the tests run some of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import failure_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--how", choices=failure_cases.HOWS, help="one way to start alone")
    args = parser.parse_args()
    seconds: list[float] = []
    wrong = 0
    for cell in failure_cases.cells():
        if args.how not in (None, cell[3]):
            continue
        with tempfile.TemporaryDirectory() as folder:
            problems, gone_after_s = failure_cases.check(cell, Path(folder))
        wrong += bool(problems)
        seconds.append(gone_after_s)
        told = problems.splitlines()[0] if problems else "ok"
        print(f"{' / '.join(map(str, cell)):<62} {gone_after_s:5.2f} s  {told}", flush=True)
    middle, most = statistics.median(seconds), max(seconds)
    print(f"{len(seconds)} cells, {wrong} wrong; all gone after {middle:.2f} s (median), {most:.2f} s at most")


if __name__ == "__main__":
    main()
