"""Ways for a rank to fail, and what has to be said of each: for the tests, and for the whole table in a script."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from processes import is_alive

#: Seconds a collective may take in these jobs.
TIMEOUT_S = 4.0

SCRIPT = """
import os, signal, sys, time
rank = int(os.environ.get("RANK", "-1"))
CAUSE, CULPRIT, OTHERS, HOW = sys.argv[1], int(sys.argv[2]), sys.argv[3], sys.argv[4]
if CAUSE == "import error" and rank == CULPRIT:
    open("fault", "w").write(str(time.time()))
    import no_such_module
import torch
from plugframe import Lite

class Data(torch.utils.data.Dataset):
    def __len__(self): return 4
    def __getitem__(self, index):
        if CAUSE == "loader worker" and int(os.environ["RANK"]) == CULPRIT and index >= 2:
            open("fault", "w").write(str(time.time()))
            raise ValueError("out of paper")
        return torch.zeros(1)

def deep(number, fail):
    if number: deep(number - 1, fail)
    else: fail()

def raises(): raise ValueError("out of paper")
def hangs(): signal.pause()  # the line that hangs

def job(lite=None):
    if lite is None:
        lite = Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=TIMEOUT, checkpoint="dcp")
        lite.launch()
    workers = 1 if CAUSE == "loader worker" else 0
    loader = lite.setup_dataloaders(torch.utils.data.DataLoader(Data(), num_workers=workers))
    lite.barrier()
    with open(f"pid-{os.getpid()}", "w"): pass
    mine = lite.global_rank == CULPRIT
    if mine:
        while not os.path.exists("others"): time.sleep(0.01)
        fault = time.time()
        if CAUSE not in ("loader worker",): open("fault", "w").write(str(fault))
        if CAUSE == "exception": deep(9, raises)
        if CAUSE == "exit 3": sys.exit(3)
        if CAUSE == "exit 0": sys.exit(0)
        if CAUSE == "SIGKILL": os.kill(os.getpid(), signal.SIGKILL)
        if CAUSE == "SIGSEGV": os.kill(os.getpid(), signal.SIGSEGV)
        if CAUSE == "out of memory":
            kept = []
            while True: kept.append(bytearray(50_000_000))
        if CAUSE == "hang": hangs()
        if CAUSE == "alone in a collective": lite.barrier("alone")
        if CAUSE == "unequal collectives": lite.all_reduce(torch.zeros(2))
        if CAUSE == "loader worker":
            for _ in loader: pass
        if CAUSE == "background save":
            def full(*args): raise OSError(28, "No space left on device")
            os.fsync = full
            lite.save("kept", {"x": torch.zeros(3)}, wait=False)
            lite.save("kept", {"x": torch.zeros(3)})
    else:
        open("others", "w").close()
        if CAUSE == "unequal collectives": lite.all_gather(torch.zeros(3))
        if CAUSE == "background save":
            lite.save("kept", {"x": torch.zeros(3)}, wait=False)
            lite.save("kept", {"x": torch.zeros(3)})
        if OTHERS == "waiting": lite.all_reduce(torch.zeros(1))
        while True: time.sleep(0.001)  # busy

if __name__ == "__main__":
    if HOW == "launch(fn)":
        Lite(accelerator="cpu", devices=2, strategy="ddp", timeout_s=TIMEOUT, checkpoint="dcp").launch(job)
    else:
        job()
""".replace("TIMEOUT", str(TIMEOUT_S))


@dataclass(frozen=True)
class Fault:
    """One way to fail.

    Attributes:
        code: the exit code it leads to.
        said: what must be on the terminal, ``{rank}`` and ``{other}`` filled in.
        waits: whether it is found out only by those who wait, after the timeout.
    """

    code: int
    said: str
    waits: bool = False


FAULTS = {
    "exception": Fault(1, r"rank {rank} on \S+ failed: ValueError: out of paper"),
    "exit 3": Fault(3, r"rank {rank} on \S+ exited with code 3"),
    "exit 0": Fault(1, r"rank {rank}\b.* (exited|shut down)"),
    "SIGKILL": Fault(137, r"rank {rank} on \S+ was killed by SIGKILL"),
    "SIGSEGV": Fault(139, r"rank {rank} on \S+ was killed by SIGSEGV"),
    "out of memory": Fault(137, r"rank {rank} on \S+ was killed by SIGKILL, out of memory"),
    "hang": Fault(1, r"rank {rank} on \S+ did not reach a collective", waits=True),
    "alone in a collective": Fault(1, r"rank {other} on \S+ did not reach a collective", waits=True),
    "unequal collectives": Fault(
        1, r"CollectiveMismatchError.*rank {rank}: all_\w+.*rank {other}|rank {other}.*rank {rank}"
    ),
    "import error": Fault(1, r"rank {rank} on \S+ failed: ModuleNotFoundError: No module named 'no_such_module'"),
    "loader worker": Fault(1, r"rank {rank} on \S+ failed: ValueError: .*worker"),
    "background save": Fault(1, r"No space left on device"),
}
HOWS = ("plugframe run", "launch()", "launch(fn)", "torchrun")


def cells() -> list[tuple[str, int, str, str]]:
    """Return every cell of the table: what fails, which rank, what the others do, how the job was started."""
    found = []
    for cause in FAULTS:
        for rank in (1, 0):
            for others in ("waiting", "busy"):
                if others == "busy" and cause in ("exit 0", "hang", "unequal collectives", "background save"):
                    continue  # nobody waits: nothing fails
                if others == "waiting" and cause == "alone in a collective":
                    continue  # that is a collective of all
                if rank == 1 and cause == "background save":
                    continue  # of a model that all ranks hold, rank 0 writes all
                found += [(cause, rank, others, how) for how in HOWS if (cause, how) != ("import error", "launch(fn)")]
    return found


def command(cause: str, rank: int, others: str, how: str) -> list[str]:
    """Return what starts the job of a cell."""
    words = ["job.py", cause, str(rank), others, how]
    if how == "plugframe run":
        words = ["-m", "plugframe", "run", "--devices=2", "--strategy=ddp", "--accelerator=cpu", *words]
    if how == "torchrun":
        words = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", *words]
    return [sys.executable, *words]


@contextmanager
def little_memory() -> Iterator[list[str]]:
    """Give the words before a command that let it have 1.5 GB, in a control group that exists meanwhile.

    Raises:
        OSError: where this process may make none.
    """
    groups = [line.split(":", 2) for line in Path("/proc/self/cgroup").read_text().splitlines()]
    own = next((path for _, controllers, path in groups if controllers == "memory"), None)
    if own is not None:
        parent, limit = Path("/sys/fs/cgroup/memory") / own.lstrip("/"), "memory.limit_in_bytes"
    else:
        parent, limit = Path("/sys/fs/cgroup") / groups[-1][2].lstrip("/"), "memory.max"
    group = parent / f"plugframe-{os.getpid()}"
    group.mkdir()
    try:
        (group / limit).write_text(f"{1_500_000_000}")
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"]
    finally:
        group.rmdir()


def why_no_little_memory() -> str:
    """Return why memory cannot be limited here, an empty string if it can."""
    try:
        with little_memory():
            return ""
    except OSError as error:
        return f"this process may limit no memory: {error}"


def check(cell: tuple[str, int, str, str], folder: Path) -> tuple[str, float]:
    """Run a cell; return what is wrong, nothing if all is well, and after how many seconds everybody was gone."""
    (folder / "job.py").write_text(SCRIPT)
    said = folder / "said"
    # A short path: sockets of loader workers are below it.
    with tempfile.TemporaryDirectory(prefix="pf-", ignore_cleanup_errors=True) as temporary:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": temporary}
        limited = little_memory() if cell[0] == "out of memory" else nullcontext([])
        with said.open("w") as out, limited as before:
            words = [*before, *command(*cell)]
            done = subprocess.run(words, cwd=folder, env=environment, stdout=out, stderr=out, timeout=120, check=False)
        left, ended = _left_behind(folder, Path(temporary))
    text = said.read_text()
    fault = FAULTS[cell[0]]
    problems = [*_problems(fault, cell[1], done.returncode, text, cell[3]), *left]
    if not (folder / "fault").exists():
        return f"it failed before it was to\n{text}", 0.0
    begun = float((folder / "fault").read_text()) + (TIMEOUT_S if fault.waits else 0.0)
    return "; ".join(problems) + (f"\n{text}" if problems else ""), ended - begun


def _left_behind(folder: Path, temporary: Path) -> tuple[list[str], float]:
    """Return what is left of a job that has ended, and when the last of its ranks had gone."""
    pids = [int(path.name.rpartition("-")[2]) for path in folder.glob("pid-*")]
    until = time.monotonic() + 30.0
    while any(map(is_alive, pids)) and time.monotonic() < until:
        time.sleep(0.01)
    ended = time.time()
    alive = [pid for pid in pids if is_alive(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    # torchrun leaves its own folder behind, and multiprocessing that of a process which is ended while it ends.
    names = [path.name for path in temporary.iterdir() if not path.name.startswith(("torchelastic", "pymp-"))]
    found = ["a rank was left behind"] if alive else []
    return found + ([f"left in the temporary folder: {', '.join(names)}"] if names else []), ended


def _problems(fault: Fault, rank: int, code: int, text: str, how: str) -> list[str]:
    if how == "torchrun":  # whose own words these are
        return [] if code != 0 else ["exit code 0"]
    problems = [] if code == fault.code else [f"exit code {code}, not {fault.code}"]
    said = fault.said.format(rank=rank, other=1 - rank)
    if not re.search(said, text, re.DOTALL):
        problems.append(f"it does not say {said!r}")
    if text.count("Traceback (most recent call last)") > (2 if "worker" in fault.said else 1):
        problems.append("more than one traceback")
    lines = [line for line in text.splitlines() if not line.startswith("plugframe: 2 ranks")]
    if len(lines) > (40 if "worker" in fault.said else 25):
        problems.append(f"{len(lines)} lines")
    return problems
