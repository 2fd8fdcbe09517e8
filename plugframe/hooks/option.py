"""Options of plugins: declared once, on the descriptor, and validated from there wherever they are set."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from types import GenericAlias
from typing import Any

from plugframe.errors import SettingError, closest

#: Types of an option, of the items of a list and of the values of a dict.
SCALARS = (str, int, float, bool)

_YES, _NO = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class Option:
    """A keyword argument of a plugin's factory that can also be set on the command line or in a settings file.

    Attributes:
        name: the keyword: ``"timeout_s"``, typed as ``--strategy.timeout-s=60``.
        type: ``str``, ``int``, ``float`` or ``bool``; ``list[str]`` and so on, typed ``a,b``; ``dict[str, int]`` and
            so on, typed ``a=1,b=2``.
        default: the factory's default; None if the plugin computes it.
        help: one line.
        choices: the allowed values, for a list those of its items; empty allows any.
        minimum: inclusive lower bound of a number.
        maximum: inclusive upper bound.
        above: exclusive lower bound.
    """

    name: str
    type: type | GenericAlias
    default: Any = None
    help: str = ""
    choices: tuple[Any, ...] = ()
    minimum: float | None = None
    maximum: float | None = None
    above: float | None = None

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", self.name) or self.name == "name":
            raise ValueError(
                f"Option({self.name!r}): an option is called like 'timeout_s', in lower case with single underscores, "
                "and not 'name', which selects the plugin."
            )
        if self.scalar not in SCALARS or self.container not in (None, list, dict):
            raise ValueError(
                f"Option({self.name!r}, {self.type!r}): the type is one of str, int, float and bool, or a list or "
                "dict of those: list[str], dict[str, int]."
            )
        if self.container is dict and self._arguments()[0] is not str:
            raise ValueError(f"Option({self.name!r}, {self.type!r}): the keys of a dict are str.")

    @property
    def container(self) -> Any:
        """``list`` or ``dict``, None for a single value."""
        return getattr(self.type, "__origin__", None)

    @property
    def scalar(self) -> Any:
        """The type of the value, of an item of a list, or of a value of a dict."""
        return (self._arguments() or (self.type,))[-1]

    @property
    def allowed(self) -> str:
        """A description of the allowed values: ``an integer from 1``."""
        words = {str: "a string", int: "an integer", float: "a number", bool: "true or false"}[self.scalar]
        if self.choices:
            words = f"one of {', '.join(map(str, self.choices))}"
        limits = [
            f"above {self.above:g}" if self.above is not None else "",
            f"from {self.minimum:g}" if self.minimum is not None else "",
            f"up to {self.maximum:g}" if self.maximum is not None else "",
        ]
        words = " ".join([words, *filter(None, limits)])
        if self.container is list:
            words = f"a list, each {words}"
        elif self.container is dict:
            words = f"names with values, each {words}"
        other = isinstance(self.default, str) and (self.container or self.scalar is not str)
        return f"{words}, or {self.default}" if other else words

    @property
    def form(self) -> str:
        """The placeholder for the value in usage lines: ``N``, ``slow|fast``, ``NAME=N,NAME=N``."""
        if self.choices and self.container is None:
            return "|".join(map(str, self.choices))
        word = {str: "TEXT", int: "N", float: "NUMBER", bool: "true|false"}[self.scalar]
        if self.container is list:
            return f"{word},{word}"
        return f"NAME={word},NAME={word}" if self.container is dict else word

    def parse(self, text: str) -> Any:
        """Parse the value of a command line option or an environment variable.

        Raises:
            ValueError: if it has the wrong type or is not allowed; the message describes the allowed values.
        """
        return self._validated(text, _parsed)

    def validate(self, value: Any) -> Any:
        """Validate a value from code or a settings file and return it; an integer for a ``float`` is converted.

        Raises:
            ValueError: if it has the wrong type or is not allowed; the message describes the allowed values.
        """
        return self._validated(value, _typed)

    def _validated(self, value: Any, convert: Any) -> Any:
        if type(value) is type(self.default) and value == self.default:
            return self.default  # such as "auto", which need not have the option's type
        try:
            found = convert(self, value)
        except ValueError:
            raise ValueError(f"it is {self.allowed}.") from None
        for item in found.values() if isinstance(found, dict) else found if isinstance(found, list) else (found,):
            if not self._allows(item):
                hint = closest(str(item), map(str, self.choices)) if self.choices else ""
                raise ValueError(f"it is {self.allowed}.{hint}")
        return found

    def _allows(self, item: Any) -> bool:
        return not (
            (self.choices and item not in self.choices)
            or (self.minimum is not None and item < self.minimum)
            or (self.maximum is not None and item > self.maximum)
            or (self.above is not None and item <= self.above)
        )

    def _arguments(self) -> tuple[Any, ...]:
        return getattr(self.type, "__args__", ())


def validate_options(owner: object, options: Iterable[Option], /, **values: Any) -> None:
    """Validate constructor arguments against declared options; `Plugin.validate` does so for a descriptor's own.

    Raises:
        SettingError: for the first value that has the wrong type or is not allowed; describes the allowed values.
    """
    declared = {option.name: option for option in options}
    for name, value in values.items():
        try:
            declared[name].validate(value)
        except ValueError as error:
            raise SettingError(f"{type(owner).__name__}({name}={value!r}): {error}") from None


def _parsed(option: Option, text: str) -> Any:
    if option.container is None:
        return _parsed_scalar(option.scalar, text)
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise ValueError
    if option.container is list:
        return [_parsed_scalar(option.scalar, part) for part in parts]
    pairs = [part.partition("=") for part in parts]
    names = [name.strip() for name, _, _ in pairs]
    if len(set(names)) < len(names) or not all(names):
        raise ValueError
    values = [_parsed_scalar(option.scalar, value.strip()) for _, _, value in pairs]
    return dict(zip(names, values, strict=True))


def _parsed_scalar(type_: Any, text: str) -> Any:
    if type_ is bool:
        if text.lower() not in (*_YES, *_NO):
            raise ValueError
        return text.lower() in _YES
    if type_ is str and not text:
        raise ValueError
    return _finite(type_(text))


def _typed(option: Option, value: Any) -> Any:
    if option.container is None:
        return _typed_scalar(option.scalar, value)
    if option.container is list and isinstance(value, tuple):  # in code
        value = list(value)
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
