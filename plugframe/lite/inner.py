"""Plugins that other plugins make by name, to wrap them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

from plugframe.core.planning.compatibility import Target
from plugframe.core.registry.catalogue import Catalogue
from plugframe.core.runtime.binding import BoundHooks
from plugframe.errors import SettingError, UnsupportedError, closest
from plugframe.hooks.context import Context, Inner


def with_make(catalogue: Catalogue) -> Callable[[Context, BoundHooks, ExitStack], Context]:
    """Return a function that gives a context the function which makes plugins by name."""

    def prepare(context: Context, hooks: BoundHooks, undo: ExitStack) -> Context:
        target = Target(context.device.type, context.world.world_size)

        def make(kind: str, name: str, /, **options: Any) -> Inner:
            return _make(catalogue, target, kind, name, options)

        return replace(context, make=make)

    return prepare


def _make(catalogue: Catalogue, target: Target, kind: str, name: str, options: dict[str, Any]) -> Inner:
    entry = catalogue.find(kind, name)
    descriptor = catalogue.describe(entry)
    if descriptor.alias_of:
        entry = catalogue.find(kind, descriptor.alias_of)
        descriptor = catalogue.describe(entry)
    declared = [option.name for option in descriptor.options]
    for word in options:
        if word not in declared:
            has = f"Its options: {', '.join(declared)}." if declared else "It has none."
            raise SettingError(f"{kind} {entry.origin} has no option {word!r}.{closest(word, declared)} {has}")
    for option in descriptor.options:
        try:
            options |= {option.name: option.validate(options[option.name])} if option.name in options else {}
        except ValueError as error:
            value = options[option.name]
            raise SettingError(f"{option.name}={value!r} of {kind} {entry.name!r}: {error}") from None
    descriptor = descriptor.with_options(options)
    problem = target.incompatibility(descriptor)
    if problem:
        raise UnsupportedError(f"{kind} {name!r} {problem}: make another one.")
    return Inner(catalogue.make(entry, options), descriptor)
