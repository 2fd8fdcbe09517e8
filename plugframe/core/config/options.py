"""Options of plugins as they are given: where they are written, how they are read, and what is wrong with them."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plugframe.errors import SettingError, closest
from plugframe.hooks.descriptor import Option

#: Kinds of which any number of plugins can be in use, each with the setting that selects them. Their options are
#: written with the name of the plugin: ``--logger.csv.folder=runs``.
MANY = {"logger": "loggers", "extension": "plugins"}
PREFIX = "PLUGFRAME_"
SEPARATOR = "__"

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Given:
    """An option as somebody wrote it; whether there is such a one is known once its plugin is.

    Attributes:
        kind: of the plugin.
        plugin: which plugin: of a kind of many, or what a settings file names beside it. Empty otherwise.
        name: of the option, with underscores.
        value: text, but from a settings file, which has types.
        source: where, in words for a message.
        by: who said it.
    """

    kind: str
    plugin: str
    name: str
    value: Any
    source: str
    by: Literal["command", "variable", "file"]

    @property
    def key(self) -> str:
        """``strategy.timeout_s``, or ``logger.csv.folder``."""
        return key(self.kind, self.plugin, self.name)

    @property
    def shown(self) -> str:
        """What was asked, for a message."""
        return f"{self.key}={self.value!r} in {self.source}"

    def spelled(self, name: str) -> str:
        """Return another option of the plugin the way this one was written."""
        if self.by == "variable":
            return variable(self.kind, self.plugin, name)
        return name if self.by == "file" else typed(self.kind, self.plugin, name)


def key(kind: str, plugin: str, name: str) -> str:
    """Return the name of an option among all: ``strategy.timeout_s``, or ``logger.csv.folder``."""
    return ".".join([kind, *([plugin] if kind in MANY else []), name])


def typed(kind: str, plugin: str, name: str) -> str:
    """Return how an option is typed: ``--strategy.timeout-s``, or ``--logger.csv.folder``."""
    return "--" + key(kind, plugin, name.replace("_", "-"))


def variable(kind: str, plugin: str, name: str) -> str:
    """Return the variable that carries an option to the ranks: ``PLUGFRAME_STRATEGY__TIMEOUT_S``."""
    middle = [plain(plugin)] if kind in MANY else []
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
    plugin, _, name = rest.rpartition(".") if kind in MANY else ("", "", rest)
    if bool(plugin) != (kind in MANY) or not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", name):
        right = typed(kind, "NAME", "OPTION")
        raise SettingError(
            f"{typed_!r} is not an option: those of a plugin of the kind {kind} are typed {right}=VALUE."
        )
    return kind, plugin, name.replace("-", "_").lower()


def plain(name: str) -> str:
    """Return a plugin's name as far as the name of a variable can hold it."""
    return re.sub(r"[^a-z0-9]", "_", name.lower())


# ---------------------------------------------------------------------- what was given


def from_variable(name: str, text: str, commanded: Mapping[str, str]) -> Given | None:
    """Return the option that a variable carries, None if it carries none.

    Args:
        name: of the variable.
        text: its value.
        commanded: the variables a command line has set, each with the option that was typed.
    """
    kind, _, rest = name.removeprefix(PREFIX).lower().partition(SEPARATOR)
    plugin, _, option = rest.rpartition(SEPARATOR) if kind in MANY else ("", "", rest)
    if not option or bool(plugin) != (kind in MANY) or name != variable(kind, plugin, option):
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
            raise SettingError(f"{path}: {kind}.name={named!r} is not the name of a plugin: write a text.")
        options = {option: value for option, value in section.items() if option != "name"}
        return named, _options(kind, "" if named in (None, "auto") else str(named), options, path)
    given: list[Given] = []
    for plugin, options in section.items():
        if not isinstance(options, dict):
            raise SettingError(
                f"{path}: {kind}.{plugin}={options!r} is no section: options of a {kind} are written under its name, "
                f"[{kind}.{plugin}]; {MANY[kind]} selects it."
            )
        given += _options(kind, plugin, options, path)
    return None, given


def _options(kind: str, plugin: str, options: Mapping[str, Any], path: Path) -> list[Given]:
    found = [Given(kind, plugin, name.replace("-", "_"), value, str(path), "file") for name, value in options.items()]
    for given in found:
        if sum(other.name == given.name for other in found) > 1:
            raise SettingError(f"{path}: {given.key!r} is given twice, with - and with _: keep one.")
    return found


# ---------------------------------------------------------------------- what it means


def read(option: Option, given: Given) -> Any:
    """Return the value of an option.

    Raises:
        SettingError: if it has the wrong type or is not allowed, saying what is.
    """
    value = given.value
    if type(value) is type(option.default) and value == option.default:
        return option.default  # "auto", where that is not of the type
    try:
        found = _parsed(option, value) if given.by != "file" else _typed(option, value)
    except ValueError:
        raise _wrong(option, given) from None
    items = found.values() if isinstance(found, dict) else found if isinstance(found, list) else (found,)
    for item in items:
        if not _fits(option, item):
            raise _wrong(option, given, item)
    return found


def allowed(option: Option) -> str:
    """Return the values an option takes, in words: ``a whole number from 1 on``."""
    words = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}[option.scalar]
    if option.choices:
        words = f"one of {', '.join(map(str, option.choices))}"
    limits = [
        f"above {option.above:g}" if option.above is not None else "",
        f"from {option.minimum:g}" if option.minimum is not None else "",
        f"up to {option.maximum:g}" if option.maximum is not None else "",
    ]
    words = " ".join([words, *filter(None, limits)])
    if option.container is list:
        words = f"a list, each {words}"
    elif option.container is dict:
        words = f"names with values, each {words}"
    other = isinstance(option.default, str) and (option.container or option.scalar is not str)
    return f"{words}, or {option.default}" if other else words


def form(option: Option) -> str:
    """Return what stands after the ``=`` on a command line."""
    if option.choices and option.container is None:
        return "|".join(map(str, option.choices))
    word = {str: "TEXT", int: "N", float: "NUMBER", bool: "true|false"}[option.scalar]
    if option.container is list:
        return f"{word},{word}"
    return f"NAME={word},NAME={word}" if option.container is dict else word


def type_name(option: Option) -> str:
    """Return the type of an option as it is written in Python."""
    return str(option.type) if option.container else option.type.__name__


def _wrong(option: Option, given: Given, item: Any = None) -> SettingError:
    hint = closest(str(item), map(str, option.choices)) if option.choices and item is not None else ""
    how = f" Type {typed(given.kind, given.plugin, option.name)}={form(option)}." if given.by == "command" else ""
    return SettingError(f"{given.shown}: it is {allowed(option)}.{hint}{how}")


def _fits(option: Option, item: Any) -> bool:
    if option.choices and item not in option.choices:
        return False
    return not (
        (option.minimum is not None and item < option.minimum)
        or (option.maximum is not None and item > option.maximum)
        or (option.above is not None and item <= option.above)
    )


def _parsed(option: Option, text: str) -> Any:
    """Read a text. Raises ValueError if it is not of the option's type."""
    if option.container is None:
        return _scalar(option.scalar, text)
    parts = _nonempty(part.strip() for part in text.split(","))
    if option.container is list:
        return [_scalar(option.scalar, part) for part in parts]
    pairs = [part.partition("=") for part in parts]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError
    return {name: _scalar(option.scalar, value.strip()) for name, (_, _, value) in zip(names, pairs, strict=True)}


def _nonempty(parts: Iterable[str]) -> list[str]:
    found = [part for part in parts if part]
    if not found:
        raise ValueError
    return found


def _scalar(type_: Any, text: str) -> Any:
    if type_ is bool:
        if text.lower() not in (*_YES, *_NO):
            raise ValueError
        return text.lower() in _YES
    if type_ is str and not text:
        raise ValueError
    return _finite(type_(text))


def _typed(option: Option, value: Any) -> Any:
    """Check what a settings file holds. Raises ValueError if it is not of the option's type."""
    if option.container is None:
        return _typed_scalar(option.scalar, value)
    if not isinstance(value, option.container):
        raise ValueError
    if isinstance(value, dict):
        return {name: _typed_scalar(option.scalar, item) for name, item in value.items()}
    return [_typed_scalar(option.scalar, item) for item in value]


def _typed_scalar(type_: Any, value: Any) -> Any:
    types = (int, float) if type_ is float else type_
    if not isinstance(value, types) or (isinstance(value, bool) and type_ is not bool):
        raise ValueError
    return _finite(float(value) if type_ is float else value)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError
    return value
