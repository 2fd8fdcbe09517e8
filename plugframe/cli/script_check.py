"""Check that the script, module or class of ``plugframe run`` exists before anything is started."""

from __future__ import annotations

import importlib.util
import os
import re
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from plugframe.cli.arguments import MODULE
from plugframe.errors import SettingError, closest


def check(command: Sequence[str]) -> None:
    """Check that the script or module of `command` exists.

    Raises:
        SettingError: naming it, with the closest there is.
    """
    if command[0] == MODULE:
        _check_module(command[1])
    else:
        _check_script(Path(command[0]))


def check_callback(text: str, command: Sequence[str]) -> None:
    """Check that ``package.module:Class`` names a package the ranks will find.

    Raises:
        SettingError: saying what is wrong with it.
    """
    if not re.fullmatch(r"[\w.]+:[\w.]+", text):
        raise SettingError(f"--callbacks={text!r} does not name a class: type package.module:Class.")
    top = text.partition(":")[0].partition(".")[0]
    # Python looks beside the script first.
    beside = os.getcwd() if command[0] == MODULE else str(Path(command[0]).parent)
    if PathFinder.find_spec(top, [beside]) is None and importlib.util.find_spec(top) is None:
        raise SettingError(
            f"--callbacks={text!r}: there is no module {top!r} beside the script or among the installed ones."
        )


def _check_script(path: Path) -> None:
    if path.is_file() or (path / "__main__.py").is_file():
        return
    if path.is_dir():
        raise SettingError(f"The script {str(path)!r} is a folder without a __main__.py: name a file in it.")
    if not path.parent.is_dir():
        raise SettingError(f"The script {str(path)!r} does not exist: there is no folder {str(path.parent)!r}.")
    files = sorted(entry.name for entry in path.parent.iterdir() if entry.is_file())
    raise SettingError(f"The script {str(path)!r} does not exist.{closest(path.name, files)}")


def _check_module(name: str) -> None:
    top = name.partition(".")[0]
    # `python -m` looks in the working directory first, which this process's own path may not hold.
    if PathFinder.find_spec(top, [os.getcwd()]) is None and importlib.util.find_spec(top) is None:
        here = sorted(entry.stem for entry in Path().iterdir() if entry.suffix == ".py" or entry.is_dir())
        raise SettingError(f"There is no module {top!r} here or among the installed ones.{closest(top, here)}")
