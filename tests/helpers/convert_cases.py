"""Run the scripts of ``tests/plugins/convert/corpus``, as they are and converted, and return the numbers they print."""

from __future__ import annotations

import contextlib
import io
import json
import random
import re
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import plugframe
from paths import TESTS
from plugframe import Lite
from plugframe.hooks.world import World
from plugframe.utils.environment import environment

FOLDER = TESTS / "plugins" / "convert" / "corpus"
_HEADER = re.compile(r"^# (ranks|tolerance): *(.*)$", re.MULTILINE)
_NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|-?\b\d+\b|\bnan\b")


@dataclass(frozen=True)
class Case:
    """A script of the corpus.

    Attributes:
        path: of the script.
        ranks: on how many ranks its losses are those of one process.
        tolerance: how far its numbers may be from those of before, relative to them.
    """

    path: Path
    ranks: int = 1
    tolerance: float = 1e-6

    @property
    def name(self) -> str:
        return self.path.stem


def cases() -> list[Case]:
    """Return the scripts."""
    found = []
    for path in sorted(FOLDER.glob("*.py")):
        header = dict(_HEADER.findall(path.read_text(encoding="utf-8")))
        found.append(Case(path, int(header.get("ranks", 1)), float(header.get("tolerance", 1e-6))))
    return found


def run(text: str, name: str, folder: Path, out: io.StringIO | None = None) -> str:
    """Run a script in this process as ``__main__``, its files in `folder`; return what it printed, also into `out`."""
    out = io.StringIO() if out is None else out
    module = types.ModuleType("__main__")
    module.__dict__["__file__"] = name
    before = sys.modules["__main__"]
    sys.modules["__main__"] = module
    random.seed(0)
    torch.manual_seed(0)
    made: list[Lite] = []
    tempfile.tempdir, temporary = str(folder), tempfile.tempdir
    try:
        with contextlib.redirect_stdout(out), _arguments(name), _tracked(made), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(text, name, "exec", dont_inherit=True), module.__dict__)
    finally:
        for lite in reversed(made):
            lite.teardown()
        if dist.is_initialized():
            dist.destroy_process_group()
        tempfile.tempdir = temporary
        sys.modules["__main__"] = before
    return out.getvalue()


@contextlib.contextmanager
def _tracked(made: list[Lite]) -> Iterator[None]:
    """Note every `Lite` that is made, so that it can be torn down as at the end of a process."""

    class Tracked(Lite):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            made.append(self)

    def spawn(fn: Any, args: tuple[Any, ...] = (), nprocs: int = 1, join: bool = True) -> None:
        fn(0, *args)

    before, spawned = plugframe.Lite, mp.spawn
    plugframe.Lite, mp.spawn = Tracked, spawn  # type: ignore[misc]
    try:
        yield
    finally:
        plugframe.Lite, mp.spawn = before, spawned  # type: ignore[misc]


def run_before(case: Case, folder: Path) -> str:
    """Run a script as it is, on one rank; of other libraries' scripts return what was recorded.

    They ran with Accelerate 1.15.0, Fabric 2.6.6 and Lite 1.8.6, on one process of a CPU.
    """
    recorded: dict[str, list[str]] = json.loads((FOLDER / "recorded.json").read_text(encoding="utf-8"))
    if case.name in recorded:
        return "\n".join(recorded[case.name])
    variables = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    with environment(variables):
        return run(case.path.read_text(encoding="utf-8"), str(case.path), folder)


def run_all(world: World, scripts: list[tuple[str, str]], folder: str) -> list[str]:
    """Run converted scripts one after the other on this rank; return what each printed, or its traceback."""
    outputs: list[str] = []
    for name, text in scripts:
        try:
            outputs.append(run(text, name, Path(folder)))
        except BaseException:  # noqa: BLE001 - the test shows whatever it is, and the ranks are out of step
            outputs.append(f"failed\n{traceback.format_exc()}")
            break
    return outputs


@contextlib.contextmanager
def _arguments(name: str) -> Iterator[None]:
    before = sys.argv
    sys.argv = [name]
    try:
        yield
    finally:
        sys.argv = before


def numbers(text: str) -> list[float]:
    return [float(each) for each in _NUMBER.findall(text)]
