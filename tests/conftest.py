"""Fixtures of all tests."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable

import pytest
import torch

from plugins_env import installed, packages  # noqa: F401 - fixtures


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
    # Results are compared bit by bit between this process and ranks, which have one thread each.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)


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
