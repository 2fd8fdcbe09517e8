"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import pytest
import torch

from plugframe.testing import ranks
from plugins_env import installed, packages  # noqa: F401 - fixtures
from process_rule import ProcessRule

#: Modules whose tests have deadlines, or start several jobs of several ranks: they run one after another.
_ONE_AT_A_TIME = ("tests/launch/", "tests/diagnostics/", "tests/plugins/slurm/")

_FOLDER = pytest.StashKey[tuple[str, "str | None"]]()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Run whole folders in parallel; one file, or one test, in this process, where a debugger works."""
    if config.args and all(".py" in word for word in config.args):
        return 0
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 8)


def pytest_configure(config: pytest.Config) -> None:
    """Give this process a temporary folder of its own, so that what a test leaves in it is seen."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # A shell's background job ignores SIGINT, and so would every process that a test starts to interrupt it.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    config.pluginmanager.register(ProcessRule(), "plugframe-process-rule")
    if not hasattr(config, "workerinput") and config.getoption("numprocesses", None):
        return  # no test runs here, but in workers that inherit the environment
    folder = tempfile.mkdtemp(prefix="plugframe-tests-")
    config.stash[_FOLDER] = (folder, os.environ.get("TMPDIR"))
    os.environ["TMPDIR"] = folder
    tempfile.tempdir = None
    for name in [n for n in os.environ if n.startswith("PLUGFRAME_")]:
        del os.environ[name]
    ranks.PRELOADED.append("preloaded")
    # Results are compared bit by bit between this process and ranks, which have one thread each.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the temporary folder."""
    if _FOLDER not in config.stash:
        return
    folder, before = config.stash[_FOLDER]
    shutil.rmtree(folder, ignore_errors=True)
    tempfile.tempdir = None
    if before is None:
        del os.environ["TMPDIR"]
    else:
        os.environ["TMPDIR"] = before


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep the tests of a file, which share jobs of ranks, in one worker; and those with deadlines all in one."""
    # Not the groups of --dist=loadgroup: xdist 3.8 writes them where pytest 9.2 no longer looks (Item._nodeid).
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.partition("::")[0]
            return "one at a time" if path.startswith(_ONE_AT_A_TIME) else path

    return ByFile(config, log)


@pytest.fixture(autouse=True, scope="session")
def _heap_is_frozen(_plugframe_torch_is_warm: None) -> None:
    """What was imported stays: the garbage collector, which tests call, need not look at it again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _nothing_left_behind(nothing_left_behind: None) -> None:
    """Every test is held to it, see `plugframe.testing.pytest_plugin`."""


@pytest.fixture
def run_python() -> Callable[[str], str]:
    """Run a piece of Python in a process of its own and return what it printed."""

    def run(code: str) -> str:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
