"""Reconstruct the command that started a script."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from plugframe.launch.command import split_interpreter_options

SAY = "from plugframe.launch import script_command; print(script_command())"


@pytest.mark.parametrize(
    ("typed", "options", "rest"),
    [
        ("train.py -m x", "", "train.py -m x"),
        ("-u -X dev train.py", "-u -X dev", "train.py"),
        ("-Xdev -Wignore -W error::UserWarning t.py", "-X dev -W ignore -W error::UserWarning", "t.py"),
        ("-BI train.py", "-BI", "train.py"),
        ("-i train.py", "", "train.py"),
        ("-Bim pkg -m", "-B", "-m pkg -m"),
        ("-mpkg x", "", "-m pkg x"),
        ("--check-hash-based-pycs always -c pass 1", "--check-hash-based-pycs always", "-c pass 1"),
        ("-", "", "-"),
        ("-u", "-u", ""),
        ("", "", ""),
    ],
)
def test_interpreter_options_are_told_from_the_scripts(typed: str, options: str, rest: str) -> None:
    """Options are parsed as Python does, with combined flags and attached values; ``-i`` is dropped."""
    assert split_interpreter_options(typed.split()) == (tuple(options.split()), tuple(rest.split()))


def python(*arguments: str, folder: Path, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, input=stdin, capture_output=True, text=True, timeout=60, check=False
    )
    return done.stdout.strip() or done.stderr.strip().splitlines()[-1]


def test_a_script_is_found_wherever_it_went(tmp_path: Path) -> None:
    """The command has the absolute path and the typed arguments, even if the script has changed them."""
    (tmp_path / "train.py").write_text("import os, sys; sys.argv = ['changed']; os.chdir('/')\n" + SAY)
    found = python("-B", "train.py", "-m", "x y", folder=tmp_path)
    assert found == repr((("-B",), (str(tmp_path / "train.py"), "-m", "x y")))


def test_a_module_is_found_by_its_name(tmp_path: Path) -> None:
    """Modules, packages, and folders with a ``__main__.py`` are found."""
    package = tmp_path / "pkg"
    package.mkdir()
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(SAY)
    assert python("-m", "pkg", "-v", folder=tmp_path) == repr(((), ("-m", "pkg", "-v")))
    assert python("pkg", "-v", folder=tmp_path) == repr(((), (str(package), "-v")))


def test_a_script_run_by_another_program_is_found(tmp_path: Path) -> None:
    """Under a debugger or a coverage tool the ranks run the script, not the tool."""
    (tmp_path / "train.py").write_text(SAY)
    tool = "import runpy, sys; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    (tmp_path / "tool.py").write_text(tool)
    assert python("tool.py", "train.py", "-v", folder=tmp_path) == repr(((), (str(tmp_path / "train.py"), "-v")))


@pytest.mark.parametrize(
    ("arguments", "what"),
    [(("-c", SAY), "Code given with `python -c`"), (("-",), "Code read from standard input"), ((), "Code read")],
)
def test_code_without_a_file_has_no_command(tmp_path: Path, arguments: tuple[str, ...], what: str) -> None:
    """The error names what was started, and the alternative."""
    said = python(*arguments, folder=tmp_path, stdin=SAY)
    assert said.startswith(f"plugframe.errors.UsageError: {what}")
    assert said.endswith("write a script, or call launch(function) with the function to run on every rank.")


def test_the_launch_package_is_light(run_python: Callable[[str], str]) -> None:
    """Neither computing the command nor importing the package imports torch."""
    assert run_python("import sys, plugframe.launch; print('torch' in sys.modules)") == "False\n"
