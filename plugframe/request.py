"""What was asked for, and where: the code, the command line, a variable, a settings file."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plugframe._compat import tomllib
from plugframe.errors import PlugframeWarning, SettingError, closest

#: Settings that name one plugin, or "auto".
NAMES = ("accelerator", "strategy", "precision", "collective", "checkpoint", "environment", "launcher")
#: Settings that hold any number of plugins.
LISTS = ("plugins", "loggers", "callbacks")
NUMBERS = ("num_nodes", "timeout_s")
FIELDS = (*NAMES, "devices", *NUMBERS, *LISTS)

PREFIX = "PLUGFRAME_"
#: Names the fields a command line set, so that a message can tell it from a variable set by hand.
FROM_COMMAND_LINE = "PLUGFRAME_FROM_COMMAND_LINE"
OTHER_VARIABLES = (FROM_COMMAND_LINE, "PLUGFRAME_TRACE", "PLUGFRAME_CONFIG")


@dataclass(frozen=True)
class Setting:
    """A value and where it comes from, in words for a message."""

    value: Any
    source: str


@dataclass(frozen=True)
class Request:
    """Every setting that was given, the strongest of each; what was not given is absent.

    Attributes:
        settings: by field.
        overridden: for a field given both in the code and on the command line, the latter; whether they
            contradict each other is known once names are resolved.
    """

    settings: Mapping[str, Setting]
    overridden: Mapping[str, Setting]

    def get(self, field: str) -> Setting | None:
        """Return the setting of `field`, None if it was not given or is ``"auto"``."""
        return self.settings.get(field)

    def value(self, field: str, default: Any = None) -> Any:
        """Return the value of `field`, or `default`."""
        setting = self.settings.get(field)
        return default if setting is None else setting.value


def gather(code: Mapping[str, Any], *, environ: Mapping[str, str] | None = None, folder: Path | None = None) -> Request:
    """Collect settings, strongest first: code, command line, settings file.

    Args:
        code: what the constructor was given.
        environ: the process's environment variables.
        folder: where the search for a settings file starts; the working directory.

    Raises:
        SettingError: for a value of a wrong type, an unknown key in a file, or a number given twice with two values.
    """
    environ = os.environ if environ is None else environ
    given = {f: Setting(v, "the code") for f, v in code.items() if not _absent(v)}
    typed = _from_environ(environ)
    filed = _from_file(environ, folder or Path.cwd())
    for field, setting in [*given.items(), *typed.items(), *filed.items()]:
        _check(field, setting)
    overridden = {f: typed[f] for f in typed if f in given}
    for field in (*NUMBERS, "devices"):
        if field in overridden and _plain(given[field].value) != _plain(overridden[field].value):
            raise contradiction(field, given[field], overridden[field])
    return Request({**filed, **typed, **given}, overridden)


def contradiction(field: str, first: Setting, second: Setting) -> SettingError:
    """Return the error for a setting given twice with two values."""
    return SettingError(
        f"{field}={_plain(first.value)!r} in {first.source}, but {_plain(second.value)!r} in {second.source}: "
        "remove one of the two, or make them equal."
    )


def variable(field: str) -> str:
    """Return the environment variable that carries a setting to the ranks."""
    return PREFIX + field.upper()


def _absent(value: Any) -> bool:
    return value is None or (isinstance(value, str) and value == "auto") or (isinstance(value, (tuple, list)) and not value)


def _plain(value: Any) -> str:
    """Return the text a value has on a command line."""
    if isinstance(value, (list, tuple)):
        return ",".join(str(v) for v in value)
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    return value if isinstance(value, str) else (str(value) if isinstance(value, (int, float)) else type(value).__name__)


def _from_environ(environ: Mapping[str, str]) -> dict[str, Setting]:
    by_command = environ.get(FROM_COMMAND_LINE, "").split(",")
    found = {}
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in OTHER_VARIABLES:
            continue
        field = name[len(PREFIX) :].lower()
        if field not in FIELDS:
            known = [variable(f) for f in FIELDS]
            warnings.warn(f"The environment variable {name} is not a setting.{closest(name, known)}", PlugframeWarning, stacklevel=4)
            continue
        if field in by_command:
            source = f"the command line (--{field.removesuffix('_s').replace('_', '-')})"
        else:
            source = f"the environment variable {name}"
        value: Any = tuple(part for part in text.split(",") if part) if field in LISTS else text
        if field in NUMBERS:
            value = _number(field, text, source)
        if not _absent(value):
            found[field] = Setting(value, source)
    return found


def _number(field: str, text: str, source: str) -> float | int:
    try:
        return float(text) if field == "timeout_s" else int(text)
    except ValueError:
        raise SettingError(f"{field}={text!r} in {source} is not a number.") from None


def find_file(environ: Mapping[str, str], folder: Path) -> Path | None:
    """Return the settings file: ``PLUGFRAME_CONFIG``, else the first found from `folder` upward."""
    named = environ.get("PLUGFRAME_CONFIG")
    if named:
        if not Path(named).is_file():
            raise SettingError(f"The settings file {named!r} does not exist.")
        return Path(named)
    for parent in (folder, *folder.parents):
        for name in ("plugframe.toml", "pyproject.toml"):
            path = parent / name
            if path.is_file() and (name == "plugframe.toml" or read_file(path) is not None):
                return path
    return None


def read_file(path: Path) -> dict[str, Any] | None:
    """Return the settings in a file, None for a ``pyproject.toml`` without ``[tool.plugframe]``.

    Raises:
        SettingError: if it is not TOML.
    """
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingError(f"{path} is not valid TOML: {error}.") from error
    if path.name != "pyproject.toml":
        return data
    section = data.get("tool", {}).get("plugframe")
    return section if isinstance(section, dict) else None


def _from_file(environ: Mapping[str, str], folder: Path) -> dict[str, Setting]:
    path = find_file(environ, folder)
    data = read_file(path) if path else None
    if not path or not data:
        return {}
    found = {}
    for key, value in data.items():
        field = key.replace("-", "_")
        if field not in FIELDS:
            raise SettingError(f"{path}: {key!r} is not a setting.{closest(field, FIELDS)} Settings: {', '.join(FIELDS)}.")
        if not _absent(value):
            found[field] = Setting(value, str(path))
    return found


def _check(field: str, setting: Setting) -> None:
    value = setting.value
    if isinstance(value, bool) or (field in NAMES and isinstance(value, float)):
        raise SettingError(f"{field}={value!r} in {setting.source} is not a value of {field}.{_allowed(field)}")
    if field == "num_nodes" and (not isinstance(value, int) or value < 1):
        raise SettingError(f"num_nodes={value!r} in {setting.source}: it is a whole number from 1.")
    if field == "timeout_s" and (not isinstance(value, (int, float)) or value <= 0):
        raise SettingError(f"timeout_s={value!r} in {setting.source}: it is a number of seconds above 0.")
    if field in LISTS and setting.source not in ("the code",) and not isinstance(value, (list, tuple)):
        raise SettingError(f"{field}={value!r} in {setting.source}: it is a list of names.")


def _allowed(field: str) -> str:
    if field == "devices":
        return " It is a count, a list of indices, or 'auto'."
    return " It is the name of a plugin; `plugframe list-plugins` shows them." if field in NAMES else ""
