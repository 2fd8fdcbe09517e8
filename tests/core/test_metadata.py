"""What is installed, read from folders as ``importlib.metadata`` reads it, and by it where that is not enough."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from plugframe import _compat
from plugframe.cli import cli
from plugframe.cli.quick_listing import show_listing
from plugframe.hooks.variables import DISABLE


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder at the beginning of the path, with distributions of every form, some of them damaged."""
    for name, files in {
        "Some_Thing-1.0.dist-info": {
            "METADATA": "Name: Some.Thing\nVersion: 1.0\nRequires-Dist: a>=1\nRequires-Dist: b\n ; extra == 'x'\n\n"
            "Requires-Dist: in the description\n",
            "entry_points.txt": "[plugframe.logger]\nthing = some:thing\n",
        },
        "old-2.egg-info": {"PKG-INFO": "Name: old\nVersion: 2\n"},
        "nothing-3.dist-info": {},
        "binary-4.dist-info": {"METADATA": b"Name: binary\nVersion: 4\n\xff\xfe"},
    }.items():
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    (tmp_path / "single-5.egg-info").write_text("Name: single\nVersion: 5\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    return tmp_path


def text_of(distribution: Any, name: str) -> str | None:
    try:
        found: str | None = distribution.read_text(name)
    except UnicodeDecodeError:
        return "damaged"
    return found


def seen(distributions: Any) -> set[tuple[str | None, ...]]:
    names = ("METADATA", "PKG-INFO", "", "entry_points.txt", "direct_url.json")
    return {(str(each.locate_file("x")), *(text_of(each, name) for name in names)) for each in distributions}


def test_folders_are_read_as_by_the_standard_library(site: Path) -> None:
    """The same distributions, with the same texts and places: folders, single files, and what is damaged."""
    found = seen(_compat.distributions())
    assert found == seen(metadata.distributions())
    assert sum(str(site) in str(row[0]) for row in found) == 5


def test_names_and_requirements(site: Path) -> None:
    """By any spelling of the name; a folded line is one, and the description holds none."""
    for name in ("some-thing", "Some.Thing", "SOME_THING", "old", "single", "torch"):
        assert _compat.installed(name)
    assert not _compat.installed("absent")
    assert _compat.requires("some.thing") == ["a>=1", "b ; extra == 'x'"]
    assert _compat.requires("plugframe") == metadata.requires("plugframe")
    (site / "late-1.dist-info").mkdir()
    os.utime(site, ns=(1, 1))
    assert _compat.installed("late")


def test_what_is_not_a_folder_is_left_to_the_standard_library(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An archive on the path, an egg, and a finder of somebody else's that knows distributions."""
    standard = metadata.Distribution

    class Finder:
        @staticmethod
        def find_spec(*_: Any) -> None: ...
        @staticmethod
        def find_distributions(*_: Any) -> list[Any]:
            return []

    (site / "some.zip").write_bytes(b"")
    for place in (str(site / "some.zip"), str(site / "thing.egg")):
        with monkeypatch.context() as patch:
            patch.syspath_prepend(place)
            assert all(isinstance(each, standard) for each in _compat.distributions())
            assert _compat.installed("torch")
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Finder])
    assert all(isinstance(each, standard) for each in _compat.distributions())


def listed(arguments: list[str]) -> tuple[str, str]:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit):
        cli.main(args=arguments, prog_name="plugframe")
    return out.getvalue(), err.getvalue()


def test_the_quick_listing_is_the_listing(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Line for line, with plugins of others, disabled ones and warnings; what is wrong is left to the command."""
    monkeypatch.setenv(DISABLE, "ddp,absent-package")
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        assert show_listing() == 0
    assert (out.getvalue(), err.getvalue()) == listed(["list-plugins"])
    assert "thing" in out.getvalue()
    assert "absent-package" in err.getvalue()
    for wrong in ("list-plugins", "a b"):
        monkeypatch.setenv(DISABLE, wrong)
        assert show_listing() is None


def test_a_listing_imports_neither_click_nor_torch() -> None:
    """They would take most of its time; whoever stops reading ends it quietly."""
    code = (
        "import sys; sys.argv = ['plugframe', 'list-plugins']\n"
        "from plugframe.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: code = end.code\n"
        "found = [name for name in ('click', 'torch', 'rich', 'importlib.metadata') if name in sys.modules]\n"
        "print(code, found, file=sys.stderr)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ddp" in found.stdout
    assert found.stderr.splitlines()[-1] == "0 []"
    read, write = os.pipe()
    os.close(read)
    command = [sys.executable, "-m", "plugframe", "list-plugins"]
    ended = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False)
    os.close(write)
    assert (ended.returncode, ended.stderr) == (1, "")
