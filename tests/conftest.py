"""Fixtures of all tests, and the check that a test leaves nothing behind."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from plugins_env import installed, packages  # noqa: F401 - fixtures

#: Helper processes of Python's own multiprocessing, which outlive a test by design and end with the session.
_STANDING = ("forkserver", "resource_tracker")

#: Folders of pytest, and of torch itself, which makes its compiler's cache on first use.
_KEPT = ("pytest-of-", "torchinductor_")


def pytest_configure(config: pytest.Config) -> None:
    """Give the session a temporary folder of its own, so that what a test leaves in it is seen."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores SIGINT, and so would every process that a test starts to interrupt it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    folder = tempfile.mkdtemp(prefix="plugframe-tests-")
    config.stash[_FOLDER] = (folder, os.environ.get("TMPDIR"))
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    for name in [n for n in os.environ if n.startswith("PLUGFRAME_")]:
        del os.environ[name]


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the session's temporary folder."""
    folder, before = config.stash[_FOLDER]
    shutil.rmtree(folder, ignore_errors=True)
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


_FOLDER = pytest.StashKey[tuple[str, "str | None"]]()


@pytest.fixture(scope="session")
def torch_is_warm() -> None:
    """The first DDP module of a process keeps its group's socket open for ever, in torch itself: here it is."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))(torch.ones(1, 1))
    torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def nothing_left_behind(torch_is_warm: None) -> Iterator[None]:
    """A test leaves no process, listening port, temporary file, variable, thread setting or process group."""
    before = _traces()
    yield
    after = _traces()
    if after != before:
        # A module and its engine refer to each other: what they hold goes with the collector, which takes a while.
        gc.collect()
        after = _traces()
    for what, value in after.items():
        if isinstance(value, set):
            left = value - before[what]
            assert not left, f"the test left {what}: {sorted(left)}"
        else:
            assert value == before[what], f"the test changed {what}"


def _traces() -> dict[str, object]:
    environ = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    return {
        "processes": _children(),
        "listening ports": _listening(),
        "temporary files": {n for n in os.listdir(tempfile.gettempdir()) if not n.startswith(_KEPT)},
        "the environment": environ,
        "the working folder": os.getcwd(),
        "the default dtype": torch.get_default_dtype(),
        "the process group": torch.distributed.is_available() and torch.distributed.is_initialized(),
    }


def _children() -> set[str]:
    found = set()
    for listing in Path("/proc/self/task").glob("*/children"):
        for pid in listing.read_text().split():
            try:
                command = Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
            except OSError:
                continue  # it ended while we looked
            if command and not any(name in command for name in _STANDING):
                found.add(f"{pid}: {command[:80]}")
    return found


def _listening() -> set[str]:
    inodes = {link.rpartition("[")[2].rstrip("]") for link in _links() if link.startswith("socket:")}
    found = set()
    for table in ("/proc/self/net/tcp", "/proc/self/net/tcp6"):
        if not os.path.exists(table):
            continue
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and fields[9] in inodes:
                found.add(fields[1])
    return found


def _links() -> list[str]:
    links = []
    for name in os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ():
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue  # the descriptor of the listing itself
    return links


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run a piece of Python in a process of its own and return what it printed."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
