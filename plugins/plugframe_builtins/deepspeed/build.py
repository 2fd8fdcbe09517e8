"""Compile DeepSpeed's extensions: check the toolchain first, and bound the wait for other processes."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from plugframe.errors import UnsupportedError

#: Interval at which another process's lock is checked.
_LOOK_S = 0.2


def check_toolchain(op: str, environ: Mapping[str, str] = os.environ) -> None:
    """Raise if the tools to compile are missing.

    Args:
        op: the extension to compile.
        environ: environment with ``PATH`` and ``CXX``.

    Raises:
        UnsupportedError: with what to install.
    """
    # A virtual environment that is not activated has ninja beside its Python, while torch searches PATH only.
    path = environ.get("PATH", "")
    if shutil.which("ninja", path=path) is None:
        beside = shutil.which("ninja", path=str(Path(sys.executable).parent))
        found = f" There is one at {beside}: activate the environment." if beside else ""
        raise UnsupportedError(
            f"strategy 'deepspeed' compiles {op} here, and there is no ninja in PATH: pip install ninja.{found}"
        )
    compiler = environ.get("CXX") or "c++"
    if shutil.which(compiler, path=path) is None:
        raise UnsupportedError(
            f"strategy 'deepspeed' compiles {op} here, and there is no C++ compiler {compiler!r} in PATH: install "
            "one (apt-get install g++), or name one in CXX."
        )


def lock_of(op: str) -> Path:
    """Return the lock file of compiling `op`; it stays when the compiling process dies."""
    from torch.utils.cpp_extension import get_default_build_root

    root = os.environ.get("TORCH_EXTENSIONS_DIR")
    if root is None:
        import torch

        version = f"py{sys.version_info.major}{sys.version_info.minor}{getattr(sys, 'abiflags', '')}"
        device = f"cu{torch.version.cuda.replace('.', '')}" if torch.version.cuda else "cpu"
        root = str(Path(get_default_build_root()) / f"{version}_{device}")
    return Path(root) / op / "lock"


def wait_for_lock(op: str, timeout_s: float) -> None:
    """Wait until no other process compiles `op`.

    Raises:
        UnsupportedError: after `timeout_s`, naming the file.
    """
    lock = lock_of(op)
    deadline = time.monotonic() + timeout_s
    while lock.exists():
        if time.monotonic() >= deadline:
            raise UnsupportedError(
                f"DeepSpeed's {op} seems to be compiled by another process: {lock} is there since more than "
                f"{timeout_s:g} s. If nothing compiles, a run was killed in the middle: delete that file. For a "
                "slower compiler raise build_timeout_s."
            )
        time.sleep(min(_LOOK_S, timeout_s))


def build(op: str, load: Callable[[], Any], *, builds: bool, hooks: Any, timeout_s: float) -> None:
    """Compile and load `op` on one rank of each host, then load it on the others. Every rank must call it.

    Args:
        load: compiles if needed, and loads.
        builds: whether this rank compiles.
        hooks: the session's hooks; a failure on any rank raises on all.

    Raises:
        UnsupportedError: with the reason, on every rank.
    """
    if builds:
        _together(hooks, lambda: _checked(op, load, timeout_s))
        return
    _together(hooks, lambda: None)
    load()


def _checked(op: str, load: Callable[[], Any], timeout_s: float) -> None:
    check_toolchain(op)
    wait_for_lock(op, timeout_s)
    load()


def _together(hooks: Any, work: Callable[[], None]) -> None:
    """Run `work`, and raise on all ranks if it failed on any."""
    reason = ""
    try:
        work()
    except Exception as error:  # noqa: BLE001 - the other ranks wait for the outcome
        reason = str(error) if isinstance(error, UnsupportedError) else f"{type(error).__name__}: {error}"
    reasons = [text for text in hooks.collective_all_gather_object(obj=reason, group=None) if text]
    if reasons:
        raise UnsupportedError(reasons[0])
