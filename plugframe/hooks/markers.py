"""The pluggy markers for hook specifications and implementations."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any, TypeVar, overload

import pluggy

PROJECT = "plugframe"
hookimpl = pluggy.HookimplMarker(PROJECT)

_F = TypeVar("_F", bound=Callable[..., Any])
_MARK = f"{PROJECT}_deprecated"
_PER_PLUGIN = f"{PROJECT}_per_plugin"
_SINCE = f"{PROJECT}_since"
_specify = pluggy.HookspecMarker(PROJECT)


@dataclass(frozen=True, kw_only=True)
class Deprecated:
    """Deprecations of a hook, with replacements.

    Attributes:
        hook: the replacement for the hook itself; empty if it is not deprecated.
        arguments: the replacement for each deprecated argument.
    """

    hook: str = ""
    arguments: Mapping[str, str] = field(default_factory=dict)


@overload
def hookspec(function: _F, /) -> _F: ...
@overload
def hookspec(*, deprecated: str = ..., deprecated_arguments: Mapping[str, str] = ...) -> Callable[[_F], _F]: ...
def hookspec(function: Any = None, /, *, deprecated: str = "", deprecated_arguments: Any = None) -> Any:
    """Mark a hook that any number of plugins can implement.

    Args:
        deprecated: marks the hook as deprecated: a sentence with the replacement. A warning names each plugin that
            implements it.
        deprecated_arguments: deprecated arguments, each with a sentence that names the replacement.
    """
    return _mark(function, False, deprecated, deprecated_arguments)


@overload
def provider(function: _F, /) -> _F: ...
@overload
def provider(
    *, since: int = ..., deprecated: str = ..., deprecated_arguments: Mapping[str, str] = ...
) -> Callable[[_F], _F]: ...
def provider(function: Any = None, /, *, since: int = 1, deprecated: str = "", deprecated_arguments: Any = None) -> Any:
    """Mark a hook that only the selected plugin of its kind implements.

    Args:
        since: the version of the contract in which the hook is new. For a plugin without it, the body of the
            specification is run instead.
        deprecated: see `hookspec`.
        deprecated_arguments: see `hookspec`.
    """

    def mark(function: _F) -> _F:
        setattr(function, _SINCE, since)
        marked: _F = _mark(function, True, deprecated, deprecated_arguments)
        return marked

    return mark if function is None else mark(function)


def _mark(function: Any, firstresult: bool, hook: str, arguments: Mapping[str, str] | None) -> Any:
    deprecated = Deprecated(hook=hook, arguments=dict(arguments or {}))

    def mark(function: _F) -> _F:
        # Not pluggy's own warn_on_impl: its warning names neither the plugin nor the package to upgrade.
        setattr(function, _MARK, deprecated)
        return _specify(function, firstresult=firstresult)

    return mark if function is None else mark(function)


def per_plugin(function: _F, /) -> _F:
    """Mark an optional hook that is called on each plugin of its kind by itself, and that nothing wraps.

    A plugin that subclasses the Protocol of its kind inherits the body of the specification as the default.
    """
    setattr(function, _PER_PLUGIN, True)
    return _specify(function)


def is_per_plugin(function: Any) -> bool:
    """Return whether a hook is called on each plugin of its kind by itself."""
    return hasattr(function, _PER_PLUGIN)


def deprecated_of(function: Any) -> Deprecated:
    """Return the deprecations of a hook, empty for most."""
    found = getattr(function, _MARK, None)
    return found if isinstance(found, Deprecated) else Deprecated()


def since_of(function: Any) -> int:
    """Return the version of the contract in which a hook is new."""
    return int(getattr(function, _SINCE, 1))


def substitute(spec: type, names: Iterable[str]) -> Any:
    """Return an object that implements hooks by the bodies of their specifications."""
    # Copies: the marks of an implementation must not be those of the specification.
    copies = {name: _copied(getattr(spec, name)) for name in names}
    return type(spec.__name__, (), {name: hookimpl(function) for name, function in copies.items()})()


def _copied(function: Any) -> Any:
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__)


def marks_of(plugin: Any, name: str) -> dict[str, Any] | None:
    """Return the options that `hookimpl` set on a method of an object's class, None if it is not marked."""
    marks = getattr(getattr(type(plugin), name, None), f"{PROJECT}_impl", None)
    return marks if isinstance(marks, dict) else None


def unmarked_of(plugin: Any, hooks: Iterable[str]) -> list[str]:
    """Return the hooks that an object's class overrides without ``@hookimpl``."""
    methods = {name: getattr(type(plugin), name, None) for name in hooks}
    marks = (f"{PROJECT}_impl", f"{PROJECT}_spec")
    return [
        name
        for name, method in methods.items()
        if callable(method) and not any(hasattr(method, mark) for mark in marks)
    ]


def deprecated_uses(caller: pluggy.HookCaller, plugin: Any) -> list[str]:
    """Return one sentence for each deprecated feature of a hook that a plugin's own implementation uses."""
    deprecated = deprecated_of(caller.spec.function if caller.spec else None)
    found: dict[str, str] = {}
    for impl in caller.get_hookimpls():
        # Methods inherited from plugframe's base classes are not the author's to fix. A function created at run time
        # may have no module.
        module = getattr(impl.function, "__module__", None) or ""
        if impl.plugin is not plugin or module.startswith(f"{PROJECT}."):
            continue
        if deprecated.hook:
            found[f"implements {caller.name}"] = deprecated.hook
        taken = [name for name in deprecated.arguments if name in (*impl.argnames, *impl.kwargnames)]
        found |= {f"takes {name} in {caller.name}": deprecated.arguments[name] for name in taken}
    return [f"{use}, which is deprecated: {instead.rstrip('.')}." for use, instead in found.items()]
