"""Contract suites of what is built in, one class for each published name."""

from __future__ import annotations

from typing import Any

from plugframe.core.registry.registry import Registry


def of_builtins(kind: str, suite: type, **own: dict[str, Any]) -> dict[str, type]:
    """Return a subclass of `suite` for every built-in name of a kind, with what `own` says of it besides.

    Strategies that work beside others only are tested by themselves.
    """
    registry = Registry.discover()
    described = [(entry.name, registry.describe(entry)) for entry in registry.entries(kind) if entry.builtin]
    named = [name for name, descriptor in described if descriptor.factory and descriptor.works_alone]
    classes = {}
    for name in named:
        title = "Test" + name.title().replace("_", "").replace("-", "")
        classes[title] = type(
            title, (suite,), {"spec": name, "__module__": f"test_contracts_{kind}", **own.get(name, {})}
        )
    return classes
