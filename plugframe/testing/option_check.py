"""Check that the declared options of a descriptor match the parameters of its factory."""

from __future__ import annotations

import inspect
from typing import Any

from plugframe.hooks.descriptor import Plugin


def disagreements(descriptor: Plugin, factory: Any) -> list[str]:
    """Return the differences between a descriptor's options and the factory's parameters."""
    taken, open_ended = parameters(factory)
    found = []
    for option in descriptor.options:
        parameter = taken.get(option.name)
        if parameter is None:
            found += [] if open_ended else [f"the option {option.name!r} is not a keyword of the factory"]
        elif parameter.kind is parameter.POSITIONAL_ONLY:
            found.append(f"the factory does not take {option.name!r} by keyword")
        elif not _same(parameter.default, option.default):
            default = "none" if parameter.default is parameter.empty else repr(parameter.default)
            found.append(f"the default of {option.name!r} is declared as {option.default!r}, and is {default}")
    for name in descriptor.preset:
        if name not in taken and not open_ended:
            found.append(f"preset= has {name!r}, which is not a keyword of the factory")
    for name, parameter in taken.items():
        if parameter.default is parameter.empty and name not in descriptor.preset:
            found.append(f"the factory requires {name!r}, which is not an option")
    return found


def parameters(factory: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of a factory, and whether it accepts any other keyword.

    A class that takes other keywords (``**options``) is taken to hand them on to the class it inherits from.
    """
    if not isinstance(factory, type):
        return _named(factory)
    found: dict[str, inspect.Parameter] = {}
    open_ended = False
    for cls in factory.__mro__[:-1]:  # without object
        if "__init__" in vars(cls):
            own, open_ended = _named(vars(cls)["__init__"])
            own.pop(next(iter(own), ""), None)  # self
            found = {**own, **found}
            if not open_ended:
                break
    return found, open_ended


def _named(function: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    every = inspect.signature(function).parameters
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = {name: parameter for name, parameter in every.items() if parameter.kind not in kinds}
    return named, any(parameter.kind is kinds[1] for parameter in every.values())


def _same(first: Any, second: Any) -> bool:
    return type(first) is type(second) and bool(first == second)
