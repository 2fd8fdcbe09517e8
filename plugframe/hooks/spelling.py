"""Options of plugins as they were given: how they are spelled, where they are written, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from plugframe.errors import SettingError
from plugframe.hooks.kinds import KINDS
from plugframe.hooks.option import Option

#: Kinds whose options are spelled with the name of the plugin: ``--logger.csv.folder=runs``.
MANY = frozenset(kind.name for kind in KINDS.values() if kind.many)
PREFIX = "PLUGFRAME_"
SEPARATOR = "__"
#: What joins the names of composed plugins.
JOINT = "+"


@dataclass(frozen=True)
class Given:
    """An option as somebody wrote it; whether there is such a one is known once its plugin is.

    Attributes:
        kind: of the plugin.
        plugin: which plugin: of a kind of many or that composes, or what a settings file names beside it. Else empty.
        name: of the option, with underscores.
        value: text, but from a settings file, which has types.
        source: where, in words for a message.
        by: who said it.
        named: whether the plugin's name is a part of its spelling.
    """

    kind: str
    plugin: str
    name: str
    value: Any
    source: str
    by: Literal["command", "variable", "file"]
    named: bool = True

    @property
    def key(self) -> str:
        """``strategy.timeout_s``, or ``logger.csv.folder``."""
        return typed(self.kind, self.plugin if self.named else "", "")[2:] + self.name

    @property
    def shown(self) -> str:
        """What was asked, for a message."""
        return f"{self.key}={self.value!r} in {self.source}"

    def spelled(self, name: str) -> str:
        """Return another option of the plugin the way this one was written."""
        if self.by == "variable":
            return variable(self.kind, self.plugin, name)
        return name if self.by == "file" else typed(self.kind, self.plugin, name)


def typed(kind: str, plugin: str, name: str) -> str:
    """Return how an option is typed: ``--strategy.timeout-s``, or ``--logger.csv.folder``."""
    named = plugin and (kind in MANY or KINDS[kind].composes)
    return "--" + ".".join([kind, *([plugin] if named else []), name.replace("_", "-")])


def variable(kind: str, plugin: str, name: str) -> str:
    """Return the variable that carries an option to the ranks: ``PLUGFRAME_STRATEGY__TIMEOUT_S``."""
    middle = [plain(plugin)] if plugin and (kind in MANY or KINDS[kind].composes) else []
    return PREFIX + SEPARATOR.join([kind, *middle, name]).upper()


def variable_of(word: str) -> str:
    """Return the variable that carries the option typed as ``--strategy.timeout-s``."""
    return variable(*parts(word))


def parts(word: str) -> tuple[str, str, str]:
    """Return kind, plugin and name of the option typed as ``--logger.csv.folder``, with or without a value.

    Raises:
        SettingError: if that is not the form of one.
    """
    typed_ = word.partition("=")[0]
    kind, _, rest = typed_.removeprefix("--").partition(".")
    plugin, _, name = rest.rpartition(".") if kind in MANY or KINDS[kind].composes else ("", "", rest)
    if (not plugin and kind in MANY) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        right = typed(kind, "NAME" if kind in MANY else "", "OPTION")
        raise SettingError(
            f"{typed_!r} is not an option: those of a plugin of the kind {kind} are typed {right}=VALUE."
        )
    return kind, plugin, name.replace("-", "_").lower()


def plain(name: str) -> str:
    """Return a plugin's name as far as the name of a variable can hold it."""
    return re.sub(r"[^a-z0-9]", "_", name.lower())


def from_variable(name: str, text: str, commanded: Mapping[str, str]) -> Given | None:
    """Return the option that a variable carries, None if it carries none.

    Args:
        name: of the variable.
        text: its value.
        commanded: the variables a command line has set, each with the option that was typed.
    """
    kind, _, rest = name.removeprefix(PREFIX).lower().partition(SEPARATOR)
    composes = kind in KINDS and KINDS[kind].composes
    plugin, _, option = rest.rpartition(SEPARATOR) if kind in MANY or composes else ("", "", rest)
    if not option or (not plugin and kind in MANY) or name != variable(kind, plugin, option):
        return None
    if name in commanded:
        plugin = commanded[name].removeprefix(f"--{kind}.").rpartition(".")[0]
        return Given(kind, plugin, option, text, f"the command line ({commanded[name]})", "command")
    return Given(kind, plugin, option, text, f"the environment variable {name}", "variable")


def from_section(kind: str, section: Mapping[str, Any], path: Path) -> tuple[Any, list[Given]]:
    """Return the name that a section of a settings file selects (None if it selects none), and its options.

    Raises:
        SettingError: if it has not the form of such a section.
    """
    if kind not in MANY:
        named = section.get("name")
        if "name" in section and not isinstance(named, (str, int)):
            raise SettingError(f"{path}: {kind}.name={named!r} is not the name of a plugin: write a string.")
        options = {option: value for option, value in section.items() if option != "name"}
        plugins = [part.strip() for part in str(named).split(JOINT)] if KINDS[kind].composes else []
        if len(plugins) > 1:
            # Options of one of several are written under its name: [strategy.NAME].
            own = {name: options.pop(name) for name in plugins if name in options}
            of_one = [given for name, values in own.items() for given in _options(kind, name, values, path)]
            return named, [*of_one, *_options(kind, "", options, path)]
        found = _options(kind, "" if named in (None, "auto") else str(named), options, path)
        return named, [replace(given, named=False) for given in found]
    given: list[Given] = []
    for plugin, options in section.items():
        if not isinstance(options, dict):
            raise SettingError(
                f"{path}: {kind}.{plugin}={options!r} is no section: options of a {kind} are written under its name, "
                f"[{kind}.{plugin}]; {KINDS[kind].setting} selects it."
            )
        given += _options(kind, plugin, options, path)
    return None, given


def _options(kind: str, plugin: str, options: Mapping[str, Any], path: Path) -> list[Given]:
    found = [Given(kind, plugin, name.replace("-", "_"), value, str(path), "file") for name, value in options.items()]
    for given in found:
        if sum(other.name == given.name for other in found) > 1:
            raise SettingError(f"{path}: {given.key!r} is given twice, with - and with _: keep one.")
    return found


def read(option: Option, given: Given) -> Any:
    """Return the value of an option, validated by its declaration.

    Raises:
        SettingError: if it has the wrong type or is not allowed, saying what is.
    """
    try:
        return option.validate(given.value) if given.by == "file" else option.parse(given.value)
    except ValueError as error:
        word = typed(given.kind, given.plugin if given.named else "", option.name)
        how = f" Type {word}={option.form}." if given.by == "command" else ""
        raise SettingError(f"{given.shown}: {error}{how}") from None


def is_composed(value: Any) -> bool:
    """Return whether a setting names several plugins: ``"a+b"``, or a list."""
    return isinstance(value, (list, tuple)) or (isinstance(value, str) and JOINT in value)


def parts_of(value: Any) -> list[Any]:
    """Return the names and objects in a setting.

    Raises:
        SettingError: if one is empty.
    """
    parts = value.split(JOINT) if isinstance(value, str) else list(value) if is_composed(value) else [value]
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    if not parts or any(part is None or part == "" for part in parts):
        raise SettingError(f"{value!r} has an empty name: write names with a {JOINT} in between, as in 'a{JOINT}b'.")
    return parts
