"""Gather the requested settings, with their sources: code, command line, variables, settings file."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plugframe.core.config.files import POLICY_KEYS, find_file, read_file
from plugframe.errors import SettingError, closest, shown
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.mesh import is_mesh, mesh_text, parse_mesh
from plugframe.hooks.spelling import MANY, PREFIX, SEPARATOR, Given, from_section, from_variable, variable_of
from plugframe.hooks.variables import ALL, FROM_COMMAND_LINE, LAUNCHED, PATIENT

#: Settings that name one plugin, or "auto".
NAMES = tuple(kind.name for kind in KINDS.values() if not kind.many)
#: Settings that select any number of plugins.
LISTS = (*(kind.setting for kind in KINDS.values() if kind.many), "callbacks")
NUMBERS = ("num_nodes", "timeout_s", "report_after_s")
SWITCHES = ("diagnostics",)
FIELDS = (*NAMES, "devices", "mesh", *NUMBERS, *SWITCHES, *LISTS)

CODE = "the code"


@dataclass(frozen=True)
class Setting:
    """A value with its source, as text for a message."""

    value: Any
    source: str


@dataclass(frozen=True)
class Request:
    """All given settings, each from its strongest source.

    Attributes:
        settings: by field.
        overridden: for a field given both in the code and on the command line, the latter; whether they
            contradict each other is known once names are resolved.
        options: of plugins, from the command line and a settings file.
        notes: what looks like a setting and is none; told once it is known which rank this is.
        file: the settings file, if there is one.
    """

    settings: Mapping[str, Setting]
    overridden: Mapping[str, Setting] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    options: tuple[Given, ...] = ()
    file: Path | None = None

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
        SettingError: for a value of a wrong type, an unknown key in a file, or a setting given twice with two values.
    """
    environ = os.environ if environ is None else environ
    given = {f: Setting(v, CODE) for f, v in code.items() if not _absent(v) or (v == [] and f not in LISTS)}
    if environ.get(PATIENT):
        given.pop("timeout_s", None)
        given.pop("report_after_s", None)
    typed, options, notes = _from_environ(environ)
    # "auto" in the code is the default; on the command line it is a choice that overrides the file.
    path = find_file(environ, folder or Path.cwd())
    filed, written = _from_file(path)
    filed = {f: s for f, s in filed.items() if f not in typed}
    options = [*written, *options]
    if environ.get(LAUNCHED):
        # They were addressed to the launcher, on its machine.
        options = [given for given in options if given.kind not in ("environment", "launcher")]
    typed = {f: s for f, s in typed.items() if not _absent(s.value)}
    for name, setting in [*given.items(), *typed.items(), *filed.items()]:
        _check(name, setting)
    overridden = {f: typed[f] for f in typed if f in given}
    for name in (*NUMBERS, *SWITCHES, "devices", "mesh", "callbacks"):
        if name in overridden and _canonical(given[name].value) != _canonical(overridden[name].value):
            raise contradiction(name, given[name], overridden[name])
    return Request({**filed, **typed, **given}, overridden, tuple(notes), tuple(options), path)


def contradiction(field: str, first: Setting, second: Setting) -> SettingError:
    """Return the error for a setting given twice with two values."""
    return SettingError(
        f"{field}={shown(first.value)} in {first.source}, but {shown(second.value)} in {second.source}: "
        "remove one of the two, or make them equal."
    )


def variable(field: str) -> str:
    """Return the environment variable that passes a setting to the ranks."""
    return PREFIX + field.upper()


def _absent(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return not value
    return value is None or (isinstance(value, str) and value == "auto")


def _canonical(value: Any) -> Any:
    """Return a canonical form of a value: equal for ``2`` and ``"2"``, different for ``[2]`` and ``"2,"``."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_canonical, value))
    if isinstance(value, Mapping):
        return tuple(sorted(value.items()))
    if not isinstance(value, (str, int, float)):
        cls = value if isinstance(value, type) else type(value)
        return f"{cls.__module__}:{cls.__qualname__}"
    if isinstance(value, str) and "," in value:
        return tuple(_canonical(part.strip()) for part in value.split(",") if part.strip())
    try:
        return float(value)
    except ValueError:
        return value


def _from_environ(environ: Mapping[str, str]) -> tuple[dict[str, Setting], list[Given], list[str]]:
    by_command = environ.get(FROM_COMMAND_LINE, "").split(",")
    commanded = {variable_of(option): option for option in by_command if option.startswith("--")}
    found: dict[str, Setting] = {}
    options: list[Given] = []
    notes: list[str] = []
    for name, text in environ.items():
        if not name.startswith(PREFIX) or name in ALL:
            continue
        field = name[len(PREFIX) :].lower()
        option = from_variable(name, text, commanded)
        if option is not None and option.kind in KINDS:
            options += [option] if text else []
            continue
        if field not in FIELDS or name != variable(field):
            rest = name.upper().partition(SEPARATOR)[2]
            of_plugins = [f"{variable(kind)}{SEPARATOR}{rest}" for kind in KINDS if rest]
            known = [*map(variable, FIELDS), *ALL, *of_plugins]
            notes.append(f"The environment variable {name} is not a setting.{closest(name.upper(), known)}")
            continue
        if field in by_command:
            source = f"the command line (--{field.removesuffix('_s').replace('_', '-')})"
        else:
            source = f"the environment variable {name}"
        value: Any = text
        if field in LISTS:
            value = tuple(part.strip() for part in text.split(",") if part.strip())
        elif field in NUMBERS and text != "auto":
            value = _number(field, text, source)
        elif field == "mesh":
            with suppress(ValueError):
                value = parse_mesh(text)
        elif field in SWITCHES:
            value = {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
        found[field] = Setting(value, source)
    return found, options, notes


def _number(field: str, text: str, source: str) -> float | int:
    try:
        return float(text) if field.endswith("_s") else int(text)
    except ValueError:
        raise SettingError(f"{field}={text!r} in {source} is not a number.") from None


def _from_file(path: Path | None) -> tuple[dict[str, Setting], list[Given]]:
    data = read_file(path) if path else None
    found: dict[str, Setting] = {}
    options: list[Given] = []
    if not path or not data:
        return found, options
    for key, value in data.items():
        if key in POLICY_KEYS:
            continue  # the registry reads the policy
        field = key.replace("-", "_")
        if field in KINDS and isinstance(value, dict):
            value, given = from_section(field, value, path)
            options += given
        elif field in MANY:
            raise SettingError(
                f"{path}: {field}={value!r} is no section: {KINDS[field].setting}= selects, [{field}.NAME] sets."
            )
        elif field not in FIELDS:
            known = (*FIELDS, *POLICY_KEYS)
            hint = closest(field, known)
            raise SettingError(f"{path}: {key!r} is not a setting.{hint} Settings: {', '.join(known)}.")
        if field in found:
            raise SettingError(f"{path}: {field!r} is given twice, with - and with _: keep one.")
        if not _absent(value):
            found[field] = Setting(value, str(path))
    return found, options


def _check(field: str, setting: Setting) -> None:
    value, source = setting.value, setting.source
    if field in SWITCHES:
        if not isinstance(value, bool):
            raise SettingError(f"{field}={value!r} in {source}: it is true or false.")
        return
    if field == "mesh":
        if not is_mesh(value):
            text = mesh_text(value) if isinstance(value, Mapping) else repr(value)
            raise SettingError(f"mesh={text} in {source}: it is a number of ranks for each axis, such as a=2,b=-1.")
        return
    wrong = isinstance(value, bool) or (value == [] and field not in LISTS)
    if wrong or (field in NAMES and isinstance(value, float)):
        raise SettingError(f"{field}={value!r} in {source} is not a value of {field}.{_allowed(field)}")
    if field == "num_nodes" and (not isinstance(value, int) or value < 1):
        raise SettingError(f"num_nodes={value!r} in {source}: it is an integer from 1.")
    if field == "timeout_s" and not (isinstance(value, (int, float)) and 0 < value < math.inf):
        raise SettingError(f"timeout_s={value!r} in {source}: it is a number of seconds above 0.")
    if field == "report_after_s" and not (isinstance(value, (int, float)) and 0 <= value < math.inf):
        raise SettingError(f"report_after_s={value!r} in {source}: it is a number of seconds, 0 for never.")
    if field in LISTS and source != CODE:
        names = value if isinstance(value, (list, tuple)) else (None,)
        if not all(isinstance(name, str) for name in names):
            raise SettingError(f"{field}={value!r} in {source}: it is a list of names.")


def _allowed(field: str) -> str:
    if field == "devices":
        return " It is a count, a list of indices, or 'auto'."
    return " It is the name of a plugin; `plugframe list-plugins` shows them." if field in NAMES else ""
