"""A registry for tests, with the built-in plugins and those that a test adds."""

from __future__ import annotations

from collections.abc import Iterable

from plugframe.core.registry.registry import Entry, Registry
from plugframe.hooks import Plugin

#: The distribution of plugins that a test adds, as messages show it.
DISTRIBUTION = "this-test"


class IsolatedRegistry(Registry):
    """A registry with plugframe's built-in plugins and no other installed ones."""

    def __init__(self, installed: Iterable[Entry]) -> None:
        super().__init__([entry for entry in installed if entry.builtin])

    def add(self, kind: str, name: str, descriptor: Plugin, *, distribution: str = DISTRIBUTION) -> Entry:
        """Publish a name, as an entry point of `distribution` would."""
        entry = Entry(kind, name, f"{distribution}:{name}", distribution, "0")
        self._entries.append(entry)
        self._descriptors[entry] = descriptor
        return entry
