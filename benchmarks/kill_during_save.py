"""Kill processes at random moments of a save over an existing checkpoint, and look at what is there afterwards.

OMP_NUM_THREADS=1 python benchmarks/kill_during_save.py [--kills 200] [--form dcp] [--size-mb 8] [--tmp /dev/shm]

Each trial starts one process, or two as the ranks of a job. They save one version of a state, which must clear up what
the trial before left, and then begin to save the next one over it; between 0 and 1.2 times as long as such a save
takes, one of them or all get SIGKILL. Then the checkpoint is loaded in another process. It is *lost* if it does not
load, or holds neither of the two versions, and a *mixture* if it holds something of each. *Leftovers* are files beside
or in the checkpoint, or in the temporary folder, that the next save did not remove.

With ``--tmp`` the temporary folder (TMPDIR) is in that folder, on another file system than the checkpoints, say.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

# A forked process would wait for threads that it does not have.
os.environ["OMP_NUM_THREADS"] = "1"

import fsspec  # type: ignore[import-untyped]
import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]
from torch import Tensor
from torch.distributed import HashStore, TCPStore  # type: ignore[attr-defined]
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from plugframe import Lite
from rounds import machine

#: How long a rank whose peer was killed may take to notice and to end.
_PATIENCE_S = 20.0
_SMALL = 24


class Form(NamedTuple):
    """A way to save: the plugin, how its paths begin, and whether it is waited for."""

    plugin: str
    scheme: str = ""
    wait: bool = True


FORMS = {
    "single file": Form("safetensors"),
    "sharded": Form("dcp"),
    "sharded, in the background": Form("dcp", wait=False),
    "remote": Form("remote", "folder://"),
    "remote, file://": Form("remote", "file://"),
}

#: How many ranks there are, and who is killed.
TARGETS = {"the only process": (1, "all"), "one of 2": (2, "one"), "all of 2": (2, "all")}


class FolderStore(LocalFileSystem):  # type: ignore[misc]
    """A store that several processes reach: a folder, at ``folder:///…``, for which it is no path of this machine."""

    protocol = "folder"

    @classmethod
    def _strip_protocol(cls, path: Any) -> Any:
        return super()._strip_protocol(str(path).removeprefix("folder://"))


# ---------------------------------------------------------------------- a state, and what it looks like


def values(version: int, size_mb: float) -> dict[str, tuple[tuple[int, ...], float]]:
    """The shape of each tensor, and the value of all its elements; the first is sharded where that can be."""
    rows = max(2, int(size_mb * 1e6 / 4 / 256 / 2) * 2)
    shapes = {"sharded": (rows // 2, 256), "whole": (rows // 4, 256), "turned": (256, rows // 4)}
    small = {f"small{number}": (number,) for number in range(_SMALL)}
    every = enumerate({**shapes, **small}.items())
    return {name: (shape, float(version * 1000 + number)) for number, (name, shape) in every}


def make_state(version: int, size_mb: float, *, rank: int, num_ranks: int, shard: bool) -> dict[str, Any]:
    model: dict[str, Tensor] = {}
    for name, (shape, value) in values(version, size_mb).items():
        if name == "sharded" and shard:
            mesh = init_device_mesh("cpu", (num_ranks,))
            rows = shape[0] * (rank + 1) // num_ranks - shape[0] * rank // num_ranks
            local = torch.full((rows, *shape[1:]), value)
            stride = (shape[1], 1)
            model[name] = DTensor.from_local(
                local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
        else:
            tensor = torch.full(shape, value)
            model[name] = tensor.t().contiguous().t() if name == "turned" else tensor
    return {"model": model, "version": version, "list": [version] * 9}


def versions_in(state: Any, size_mb: float) -> set[float]:
    """Return the versions that values in a state belong to; -1 for values of no version."""
    found: set[float] = {state["version"], *state["list"]}
    wanted = values(0, size_mb)
    if set(state["model"]) != set(wanted):
        return {*found, -1}
    for name, (shape, offset) in wanted.items():
        tensor = state["model"][name]
        if tuple(tensor.shape) != shape:
            return {*found, -1}
        if tensor.numel():
            least, most = tensor.aminmax()
            found |= {(each.item() - offset) / 1000 for each in (least, most)}
    return found


# ---------------------------------------------------------------------- one rank


@dataclass
class Pipes:
    """How a trial speaks with its ranks: a byte when one is ready, one to each to go on, one when it is done."""

    ready: tuple[int, int] = field(default_factory=os.pipe)
    go: tuple[int, int] = field(default_factory=os.pipe)
    done: tuple[int, int] = field(default_factory=os.pipe)

    def close(self) -> None:
        for end in (*self.ready, *self.go, *self.done):
            try:
                os.close(end)
            except OSError:
                continue  # closed before


def be_a_rank(form: Form, path: str, version: int, size_mb: float, rank: int, num_ranks: int, pipes: Pipes) -> None:
    """Save one version and, when told to, the next; then wait for the end."""
    os.close(pipes.go[1])
    if num_ranks > 1:
        names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
        os.environ.update(zip(names, map(str, (rank, rank, num_ranks, num_ranks)), strict=True))
    lite = Lite(accelerator="cpu", devices=num_ranks, checkpoint=form.plugin)
    lite.launch()
    shard = num_ranks > 1 and form.plugin != "safetensors"
    states = [make_state(each, size_mb, rank=rank, num_ranks=num_ranks, shard=shard) for each in (version, version + 1)]
    lite.save(path, states[0])
    lite.barrier()
    os.write(pipes.ready[1], b".")
    if not os.read(pipes.go[0], 1):
        return
    handle = lite.save(path, states[1]) if form.wait else lite.save(path, states[1], wait=False)
    if handle is not None:
        handle.wait()
    os.write(pipes.done[1], b".")
    os.read(pipes.go[0], 1)  # until the trial is over


def fork(body: Callable[[], None], log: str) -> int:
    """Call `body` in a process of its own, which ends with it and says nothing."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1)
        os.dup2(output, 2)
        body()
        status = 0
    except BaseException as error:  # noqa: BLE001 whatever it is, this process is over
        os.write(2, f"{type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(status)


# ---------------------------------------------------------------------- one trial


@dataclass
class Trials:
    """Kills of one form, with one number of ranks."""

    form: Form
    num_ranks: int
    who: str
    folder: str
    size_mb: float
    version: int = 0
    duration_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def path(self) -> str:
        return os.path.join(self.folder, "last")

    def start(self) -> tuple[list[int], Pipes]:
        """Start the ranks and return once each has saved, and begins to save again when it is told to."""
        os.environ["TORCHELASTIC_RESTART_COUNT"] = str(int(os.environ["TORCHELASTIC_RESTART_COUNT"]) + 1)
        self.version += 2
        pipes, url = Pipes(), self.form.scheme + self.path
        log = os.path.join(os.path.dirname(self.folder), "log")
        with open(log, "w"):
            pass

        def body(rank: int) -> Callable[[], None]:
            return lambda: be_a_rank(self.form, url, self.version, self.size_mb, rank, self.num_ranks, pipes)

        pids = [fork(body(rank), log) for rank in range(self.num_ranks)]
        for _ in pids:
            if not select.select([pipes.ready[0]], [], [], 60)[0]:
                with open(log) as said:
                    text = said.read()
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                raise RuntimeError(f"a rank did not start: {text}")
            os.read(pipes.ready[0], 1)
        return pids, pipes

    def measure(self, times: int) -> None:
        """Let the ranks save without being killed, to know how long it takes."""
        took: list[float] = []
        for _ in range(times):
            pids, pipes = self.start()
            began = time.perf_counter()
            os.write(pipes.go[1], b"." * len(pids))
            for _ in pids:
                if not select.select([pipes.done[0]], [], [], 60)[0]:
                    raise RuntimeError("a save does not end")
                os.read(pipes.done[0], 1)
            took.append(time.perf_counter() - began)
            os.close(pipes.go[1])
            for pid in pids:
                os.waitpid(pid, 0)
            pipes.close()
        self.duration_s = statistics.median(took)

    def kill(self, verify: Callable[[str], Any]) -> None:
        """Make one trial."""
        pids, pipes = self.start()
        self.counts["leftovers"] += self.left_over()
        victims = pids if self.who == "all" else [random.choice(pids)]
        delay_s = random.uniform(0, 1.2 * self.duration_s)
        os.write(pipes.go[1], b"." * len(pids))
        time.sleep(delay_s)
        for pid in random.sample(victims, len(victims)):
            os.kill(pid, signal.SIGKILL)
        saved = len(os.read(pipes.done[0], 9)) if select.select([pipes.done[0]], [], [], 0)[0] else 0
        os.close(pipes.go[1])
        self.counts["stuck"] += sum(not ends(pid) for pid in pids)
        pipes.close()
        self.counts["kills"] += 1
        self.counts["in the save"] += saved < len(pids)
        self.judge(verify)

    def end(self) -> None:
        """Save once more, to see what the last one left."""
        pids, pipes = self.start()
        self.counts["leftovers"] += self.left_over()
        pipes.close()
        for pid in pids:
            os.waitpid(pid, 0)

    def judge(self, verify: Callable[[str], Any]) -> None:
        """Load what is there and count what it is."""
        try:
            found = versions_in(verify(self.form.scheme + self.path), self.size_mb)
        except Exception as error:  # noqa: BLE001 whatever it is, there is no checkpoint
            print(f"lost: {type(error).__name__}: {error}", file=sys.stderr)
            self.counts["lost"] += 1
            return
        if len(found) > 1:
            print(f"a mixture of versions {sorted(found)}, expected {self.version} or the next", file=sys.stderr)
            self.counts["mixtures"] += 1
        elif found == {self.version}:
            self.counts["old"] += 1
        elif found == {self.version + 1}:
            self.counts["new"] += 1
        else:
            print(f"version {found}, expected {self.version} or the next", file=sys.stderr)
            self.counts["lost"] += 1

    def left_over(self) -> int:
        """Count what is there besides the checkpoint, once it has been saved again."""
        found = [name for name in os.listdir(self.folder) if name != "last"]
        if os.path.isdir(self.path):
            data = [name for name in os.listdir(self.path) if name != "manifest.json"]
            found += data[self.num_ranks :]
        for name in os.listdir(tempfile.gettempdir()):
            found.append(name)
            # Once is enough to count it.
            shutil.rmtree(os.path.join(tempfile.gettempdir(), name), ignore_errors=True)
        for name in found:
            print(f"left over: {name}", file=sys.stderr)
        return len(found)


def ends(pid: int) -> bool:
    """Wait for a process; say whether it ended by itself, or was killed before."""
    deadline = time.monotonic() + _PATIENCE_S
    while os.waitpid(pid, os.WNOHANG) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            return False
        time.sleep(0.002)
    return True


# ---------------------------------------------------------------------- all of them


def warm_up() -> None:
    """Import here what every rank would import otherwise, when it first shards a tensor and saves."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    make_state(0, 0, rank=0, num_ranks=1, shard=True)
    dist.destroy_process_group()
    threads = len(os.listdir("/proc/self/task"))
    assert threads == 1, f"{threads} threads, and a forked process has one of them"


@contextmanager
def served_store() -> Iterator[None]:
    """Serve the ranks of all trials, as torchrun's agent does, from a process of its own: this one only forks."""
    here, there = os.pipe()
    pid = os.fork()
    if pid == 0:
        store = TCPStore("127.0.0.1", 0, None, True, wait_for_workers=False)
        os.write(there, str(store.port).encode())
        signal.pause()
    port = os.read(here, 16).decode()
    os.close(here)
    os.close(there)
    agent = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    os.environ.update(agent, TORCHELASTIC_RESTART_COUNT="0")
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def trials_of(name: str, target: str, *, kills: int, size_mb: float, folder: str) -> dict[str, Any]:
    """Make all trials of one form with one target, and return what came of them."""
    num_ranks, who = TARGETS[target]
    place = tempfile.mkdtemp(dir=folder)
    lite = Lite(accelerator="cpu", devices=1, checkpoint=FORMS[name].plugin)
    lite.launch()
    trials = Trials(FORMS[name], num_ranks, who, place, size_mb)
    for number in range(kills):
        if number % 20 == 0:
            # Again and again: other work on the machine comes and goes.
            trials.measure(min(5, kills))
        trials.kill(lite.load)
    trials.end()
    lite.teardown()
    shutil.rmtree(place)
    counts = {key: trials.counts[key] for key in COUNTED}
    return {"form": name, "killed": target, "save_s": round(trials.duration_s, 4), **counts}


COUNTED = ("kills", "in the save", "old", "new", "lost", "mixtures", "leftovers", "stuck")


def line(row: dict[str, Any]) -> str:
    return f"{row['form']:28}{row['killed']:18}{row['save_s']:8.3f}" + "".join(f"{row[key]:>12}" for key in COUNTED)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="of each form, for each of who is killed")
    parser.add_argument("--form", action="append", choices=FORMS, help="by default all")
    parser.add_argument("--killed", action="append", choices=TARGETS, help="by default all")
    parser.add_argument("--size-mb", type=float, default=8)
    parser.add_argument("--folder", default=tempfile.gettempdir(), help="where the checkpoints are")
    parser.add_argument("--tmp", default=None, help="where the temporary folder is; that of the checkpoints by default")
    parser.add_argument("--json", action="store_true", help="print the rows as JSON")
    options = parser.parse_args()
    fsspec.register_implementation("folder", FolderStore)
    logging.getLogger("plugframe").addHandler(logging.NullHandler())
    warm_up()
    rows = []
    before = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(dir=options.folder) as folder, tempfile.TemporaryDirectory(dir=options.tmp) as tmp:
        os.environ["TMPDIR"] = tempfile.tempdir = tmp
        if not options.json:
            print(machine())
            print(f"{options.size_mb:g} MB in {folder}, the temporary folder is {tmp}")
            print(f"{'form':28}{'killed':18}{'save (s)':>8}" + "".join(f"{key:>12}" for key in COUNTED))
        with served_store():
            for name in options.form or FORMS:
                for target in options.killed or TARGETS:
                    row = trials_of(name, target, kills=options.kills, size_mb=options.size_mb, folder=folder)
                    rows.append(row)
                    if not options.json:
                        print(line(row), flush=True)
    tempfile.tempdir = None
    if before is not None:
        os.environ["TMPDIR"] = before
    if options.json:
        print(json.dumps(rows))
    if any(row["lost"] + row["mixtures"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    main()
