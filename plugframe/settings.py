"""Where settings are written down: the file that counts, and what is in it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plugframe import _compat
from plugframe.errors import SettingError

PYPROJECT = "pyproject.toml"
SECTION = "tool.plugframe"
#: The variable that names a file instead.
CONFIG = "PLUGFRAME_CONFIG"
#: Names the fields a command line set, so that a message can tell it from a variable set by hand.
FROM_COMMAND_LINE = "PLUGFRAME_FROM_COMMAND_LINE"


def find_file(environ: Mapping[str, str], folder: Path) -> Path | None:
    """Return the settings file: ``PLUGFRAME_CONFIG``, else the first found from `folder` upward.

    Raises:
        SettingError: if the named one does not exist or holds no settings.
    """
    named = environ.get(CONFIG)
    if named:
        if not Path(named).is_file():
            what = "is a folder" if Path(named).is_dir() else "does not exist"
            raise SettingError(f"The settings file {named!r} {what}.")
        if read_file(Path(named)) is None:
            raise SettingError(f"The settings file {named!r} has no section [{SECTION}].")
        return Path(named)
    for parent in (folder, *folder.parents):
        for name in ("plugframe.toml", PYPROJECT):
            path = parent / name
            if path.is_file() and read_file(path) is not None:
                return path
    return None


def read_file(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file, None for a ``pyproject.toml`` without ``[tool.plugframe]``.

    Raises:
        SettingError: if it cannot be read, or is not TOML.
    """
    try:
        text = path.read_text(encoding="utf-8")
        if path.name == PYPROJECT and "plugframe" not in text:
            return None  # the parser alone would take longer than all the rest of a listing
        data = _compat.tomllib.loads(text)
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
