"""Other people's plugins: the distributions under ``tests/packages``, installed by pip where a test wants them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paths import TESTS

PACKAGES = TESTS / "packages"


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Install one of the distributions, the first time it is asked for, and return its folder."""
    folders = tmp_path_factory.mktemp("installed")

    def install(name: str) -> Path:
        folder = folders / name
        if not folder.exists():
            # Offline, with the build backend that is here, into a folder of its own.
            options = ["--no-deps", "--no-index", "--no-build-isolation", "--no-cache-dir", "--no-compile"]
            words = ["install", "--quiet", "--disable-pip-version-check", *options, "--target", folder, PACKAGES / name]
            command = [sys.executable, "-m", "pip", *map(str, words)]
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
            assert done.returncode == 0, done.stderr
        return folder

    return install


@pytest.fixture
def packages(installed: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Return a function that puts distributions on the path, of this process and of those it starts, for one test."""
    used: set[str] = set()

    def use(*names: str) -> None:
        folders = [str(installed(name)) for name in names]
        for folder in folders:
            monkeypatch.syspath_prepend(folder)
        inherited = [path for path in (os.environ.get("PYTHONPATH"),) if path]
        monkeypatch.setenv("PYTHONPATH", os.pathsep.join([*folders, *inherited]))
        used.update(f"plugframe_{name}" for name in names)

    yield use
    for module in [name for name in sys.modules if name.partition(".")[0] in used]:
        del sys.modules[module]
