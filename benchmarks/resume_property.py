"""How many of the runs drawn at random end, killed and resumed, where they end uninterrupted: law 4 as a property.

    python benchmarks/resume_property.py --cases 200

Each case draws a model, an optimizer, a sampler, a precision, a strategy, a checkpoint format, and when who is killed
(SIGKILL to one rank, all ranks or the launcher); see ``tests/helpers/resume_cases.py``.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

import resume_cases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1000, help="of the first case; the others follow")
    args = parser.parse_args()
    kinds: Counter[str] = Counter()
    failed = 0
    started = time.monotonic()
    for seed in range(args.seed, args.seed + args.cases):
        settings = resume_cases.draw(seed)
        with tempfile.TemporaryDirectory(prefix="resume-") as folder:
            try:
                problems = resume_cases.check(seed, Path(folder) / "case")
            except Exception as error:  # noqa: BLE001 - counted and shown
                problems = f"{type(error).__name__}: {str(error)[-2000:]}"
        kinds.update(
            f"{key} {settings[key]}" for key in ("ranks", "strategy", "precision", "loader", "workers", "victims")
        )
        kinds["kills"] += len(settings["kills"])
        if problems:
            failed += 1
            print(f"{seed}: {settings}\n   {problems}", flush=True)
    print(f"{args.cases} cases, {kinds.pop('kills')} kills, {failed} that differ; {time.monotonic() - started:.0f} s")
    for kind, count in sorted(kinds.items()):
        print(f"  {kind:<28}{count}")


if __name__ == "__main__":
    main()
