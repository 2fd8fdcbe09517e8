"""Whether jobs that start at one moment on one host find their own ranks: with defaults, no port given.

python benchmarks/starts.py [--jobs 20]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPT = """
import sys, torch
from plugframe import Lite
lite = Lite(accelerator="cpu", devices=2, strategy="ddp")
lite.launch()
total = lite.all_reduce(torch.tensor(int(sys.argv[1])), reduce_op="sum").item()
everyone = lite.all_gather(int(sys.argv[1])).tolist()
assert total == 2 * int(sys.argv[1]) and everyone == [int(sys.argv[1])] * 2, (total, everyone)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--jobs", type=int, default=20)
    number = parser.parse_args().jobs
    with tempfile.TemporaryDirectory() as folder:
        script, temporary = Path(folder, "train.py"), Path(folder, "temporary")
        script.write_text(SCRIPT)
        temporary.mkdir()
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        command = [sys.executable, "-m", "plugframe", "run", "--devices=2", "--accelerator=cpu", str(script)]
        begun = time.monotonic()
        jobs = [
            subprocess.Popen([*command, str(job)], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
            for job in range(number)
        ]
        said = [job.communicate(timeout=900)[1].decode(errors="replace") for job in jobs]
        failed = [text for job, text in zip(jobs, said, strict=True) if job.returncode != 0]
        left = sorted(path.name for path in temporary.iterdir() if not path.name.startswith("torchinductor_"))
    print(
        f"{number - len(failed)} of {number} jobs of two ranks ended well, all within {time.monotonic() - begun:.0f} s"
    )
    print(f"left in the temporary folder: {', '.join(left) or 'nothing'}")
    print("\n".join(failed), end="")


if __name__ == "__main__":
    main()
