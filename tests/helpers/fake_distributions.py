"""Distributions written by a test: metadata and a module, in a folder that the test puts on the path."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

#: Complete plugins of two kinds, as module sources; ``plugin`` is the descriptor.
EXTENSION = """
from plugframe import Plugin
from plugframe.base import Extension
plugin = Plugin(factory=f"{__name__}:Thing", summary="It does nothing.")
class Thing(Extension):
    pass
"""
STRATEGY = """
from plugframe import Plugin
from plugframe.base import Strategy
plugin = Plugin(factory=f"{__name__}:Thing", summary="A strategy.")
class Thing(Strategy):
    pass
"""


def module_of(distribution: str) -> str:
    """Return the name of the module that `publish` writes."""
    return distribution.replace("-", "_")


def publish(
    folder: Path,
    distribution: str,
    version: str,
    kind: str,
    *names: str,
    source: str = EXTENSION,
    value: str = "{module}:plugin",
) -> None:
    """Write a distribution that publishes `names`, all of one descriptor, as pip would leave it."""
    module = module_of(distribution)
    about = folder / f"{module}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.4\nName: {distribution}\nVersion: {version}\n")
    points = "".join(f"{name} = {value.format(module=module)}\n" for name in names)
    (about / "entry_points.txt").write_text(f"[plugframe.{kind}]\n{points}")
    (folder / f"{module}.py").write_text(source)


@pytest.fixture
def shelf(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return `publish` for a folder on the path, of this process and of those it starts, for one test."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    written: list[str] = []

    def put(distribution: str, *words: str, **more: str) -> None:
        written.append(module_of(distribution))
        publish(folder, distribution, *words, **more)

    yield put
    for name in written:
        sys.modules.pop(name, None)


def in_folder(folder: Path) -> dict[str, str]:
    """Return the environment of a process that sees the distributions of `folder`."""
    return {**os.environ, "PYTHONPATH": str(folder)}
