"""Find, check and read the settings file."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugframe import _compat
from plugframe.errors import SettingError
from plugframe.hooks.variables import CONFIG

PYPROJECT = "pyproject.toml"
#: Names of entries that mark the root of a project.
_ROOT_MARKS = (PYPROJECT, ".git", ".hg")
SECTION = "tool.plugframe"
#: Lists of plugins that are never imported, and of the only ones that may be; see `plugframe.core.registry.policy`.
POLICY_KEYS = ("disable", "allow")


def find_file(environ: Mapping[str, str], folder: Path) -> Path | None:
    """Return the settings file of the project: ``PLUGFRAME_CONFIG``, else the first found from `folder` upward.

    The search ends at the first folder with a ``pyproject.toml`` or a repository in it, the project's root. Where no
    folder above has one, `folder` alone is searched. A settings file names code that runs in the job, so one that
    another user can write is refused; naming a file is trusting it.

    Raises:
        SettingError: if the named one does not exist or holds no settings, or another user can write the found one.
    """
    named = environ.get(CONFIG)
    if named:
        if not Path(named).is_file():
            what = "is a folder" if Path(named).is_dir() else "does not exist"
            raise SettingError(f"The settings file {named!r} {what}.")
        if read_file(Path(named)) is None:
            raise SettingError(f"The settings file {named!r} has no section [{SECTION}].")
        return Path(named)
    for parent in _project(folder):
        for name in ("plugframe.toml", PYPROJECT):
            path = parent / name
            if path.is_file() and read_file(path) is not None:
                _check_owner(path)
                return path
    return None


def _project(folder: Path) -> list[Path]:
    """Return the folders from `folder` up to the root of its project."""
    found = []
    for parent in (folder, *folder.parents):
        found.append(parent)
        if any((parent / mark).exists() for mark in _ROOT_MARKS):
            return found
    return [folder]


def _check_owner(path: Path) -> None:
    """Raise if another user can write or replace the settings file.

    Raises:
        SettingError: naming the user or the permission.
    """
    if not hasattr(os, "getuid"):  # Windows
        return
    for place, status in ((path, path.stat()), (path.parent, path.parent.stat())):
        problem = ""
        if status.st_uid not in (os.getuid(), 0):
            problem = f"belongs to another user (uid {status.st_uid})"
        elif status.st_mode & stat.S_IWOTH and not (place != path and status.st_mode & stat.S_ISVTX):
            problem = "can be written by every user"
        elif status.st_mode & stat.S_IWGRP and not _is_private_group(status):
            problem = f"can be written by the group with gid {status.st_gid}"
        if problem:
            raise SettingError(
                f"The settings file {path} is not read, because {'it' if place == path else str(place)} {problem}: "
                f"change that (chmod go-w, chown), or trust it by --config={path}."
            )


def _is_private_group(status: os.stat_result) -> bool:
    """Return whether a group has no members but its owner, as the default group of a user."""
    import grp
    import pwd

    try:
        members = set(grp.getgrgid(status.st_gid).gr_mem)
        owner = pwd.getpwuid(status.st_uid)
    except KeyError:
        return False
    return owner.pw_gid == status.st_gid and members <= {owner.pw_name}


def read_file(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file, None for a ``pyproject.toml`` without ``[tool.plugframe]``.

    Raises:
        SettingError: if it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == PYPROJECT and "plugframe" not in text:
            return None  # importing the TOML parser takes longer than the rest of a listing
        data: dict[str, Any] = _compat.tomllib.loads(text)
    except (_compat.tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid TOML: {error}.") from error
    except OSError as error:
        raise SettingError(f"{path} cannot be read: {error.strerror}.") from error
    if path.name != PYPROJECT:
        return data
    tools = data.get("tool", {})
    section = tools.get("plugframe") if isinstance(tools, dict) else None
    if section is not None and not isinstance(section, dict):
        raise SettingError(f"{path}: plugframe={section!r} under [tool] is no section: write [{SECTION}].")
    return section
