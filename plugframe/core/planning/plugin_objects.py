"""Plugin objects a user made: of which kind each is."""

from __future__ import annotations

import sys
from typing import Any

from plugframe.errors import SettingError
from plugframe.hooks.kinds import KINDS, Kind
from plugframe.hooks.markers import PROJECT


def is_kind(instance: Any, kind: str) -> bool:
    """Say whether an object provides hooks of `kind`; an extension is whatever has a hook at all."""
    if kind == "extension":
        return any(_marks(instance, name) is not None for name in dir(type(instance)))
    # A wrapper has the hook's name too, but it is an extension's way in, not a provider.
    found = (_marks(instance, name) for name in hooks_of(KINDS[kind]))
    return any(marks is not None and not (marks["wrapper"] or marks["hookwrapper"]) for marks in found)


def kind_of(instance: Any) -> str:
    """Return the kind of a plugin object."""
    return next((kind for kind in KINDS if kind != "extension" and is_kind(instance, kind)), "extension")


def hooks_of(kind: Kind) -> list[str]:
    """Return the names of the hooks of a kind."""
    return [name for name, value in vars(kind.spec).items() if hasattr(value, f"{PROJECT}_spec")]


def by_kind(plugins: Any) -> dict[str, list[Any]]:
    """Sort what ``plugins=`` holds; names and extensions are left out.

    Raises:
        SettingError: if it holds two of a kind of which one can be in use.
    """
    found: dict[str, list[Any]] = {}
    for plugin in plugins if isinstance(plugins, (list, tuple)) else (plugins,):
        if not isinstance(plugin, str):
            found.setdefault(kind_of(plugin), []).append(plugin)
    found.pop("extension", None)
    for kind, instances in found.items():
        if len(instances) > 1 and not KINDS[kind].many:
            raise SettingError(f"plugins= holds {len(instances)} objects of the kind {kind}: one can be in use.")
    return found


def made_by(instance: Any, factory: str) -> bool:
    """Say whether `factory` (``"package.module:Name"``) names the object's class. Nothing is imported for it."""
    cls = type(instance)
    if factory == f"{cls.__module__}:{cls.__qualname__}":
        return True
    module, _, name = factory.partition(":")
    return getattr(sys.modules.get(module), name, None) is cls


def _marks(instance: Any, name: str) -> dict[str, Any] | None:
    """Return what ``@hookimpl`` noted on a method, None if it is not marked."""
    marks = getattr(getattr(type(instance), name, None), f"{PROJECT}_impl", None)
    return marks if isinstance(marks, dict) else None
