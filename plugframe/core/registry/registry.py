"""The plugin registry: names from distribution metadata; descriptors and factories imported on demand."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from plugframe._compat import importable, installed, is_submodule, requires
from plugframe.core.registry.entry_points import COMMAND, Entry, normalize, published
from plugframe.core.registry.policy import Policy, read_policy
from plugframe.errors import (
    AmbiguousPluginError,
    MissingDependencyError,
    PlugframeError,
    PluginLoadError,
    RefusedPluginError,
    UnknownPluginError,
    article,
    closest,
)

if TYPE_CHECKING:
    from plugframe.hooks.descriptor import Plugin

__all__ = ["Entry", "Registry"]


class Registry:
    """The plugins of a Python environment. Building it imports nothing."""

    def __init__(self, entries: Iterable[Entry], policy: Policy | None = None) -> None:
        self.policy = policy or Policy()
        self._entries = sorted(entries, key=lambda e: (e.kind, not e.builtin, e.distribution, e.name))
        self._refused = {entry: why for entry in self._entries if (why := self.policy.refusal(entry))}
        self._own = {(entry.kind, entry.name) for entry in self._entries if entry.builtin}
        self._descriptors: dict[Entry, Plugin] = {}
        self._requirements: dict[str, list[str]] = {}

    @classmethod
    def discover(cls, *, environ: Mapping[str, str] | None = None) -> Registry:
        """Read the metadata of every installed distribution, and the plugin policy.

        Args:
            environ: variables to read that from, instead of this process's own.

        Raises:
            SettingError: for a list of disabled or allowed plugins that cannot be read, and for a plugin that the
                command line disables and that is not installed.
        """
        entries, policy = published().entries, read_policy(os.environ if environ is None else environ)
        policy.check(entries)
        return cls((entry for entry in entries if entry.kind != COMMAND), policy)

    def notes(self) -> tuple[str, ...]:
        """Return warnings about the policy, and about foreign packages under plugframe's name."""
        place = published().impostor
        other = f"The distribution in {place} calls itself plugframe, and is not the one that runs: uninstall it."
        return (*self.policy.notes(self._entries), *([other] if place else []))

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return the installed plugins that the policy allows, built-ins first; of one kind if given."""
        return [e for e in self._entries if (kind is None or e.kind == kind) and e not in self._refused]

    def refused(self, kind: str | None = None) -> dict[Entry, str]:
        """Return the installed plugins that the policy refuses, with reasons."""
        return {e: why for e, why in self._refused.items() if kind is None or e.kind == kind}

    def names(self, kind: str) -> list[str]:
        """Return the names that select a plugin unqualified, sorted."""
        return sorted({e.name for e in self.entries(kind)})

    def shadowed(self, entry: Entry) -> bool:
        """Return whether the bare name is a built-in's, disabled or not, so that others need a qualified name."""
        return not entry.builtin and (entry.kind, entry.name) in self._own

    def find(self, kind: str, name: str, *, look_inside: bool = True) -> Entry:
        """Return the entry `name` stands for: a bare name, or one qualified by its distribution.

        Args:
            look_inside: whether, for a name that is unknown, descriptors may be imported to see what replaces it.

        Raises:
            UnknownPluginError: with the closest match and what is installed, or what replaces a retired name.
            AmbiguousPluginError: if two distributions publish it and none of them is plugframe.
            RefusedPluginError: if it is installed, and disabled or not allowed.
        """
        distribution, colon, bare = name.rpartition(":")
        named = [e for e in self._entries if e.kind == kind and e.name == bare]
        if colon:
            named = [e for e in named if normalize(e.distribution) == normalize(distribution)]
        if not named:
            raise self._unknown(kind, name, look_inside=look_inside)
        # A built-in's name stays reserved while it is disabled, so that no other package can take it over.
        usable = named[:1] if named[0].builtin else [e for e in named if e not in self._refused]
        if len(usable) > 1:
            qualified = " or ".join(repr(e.qualified) for e in usable)
            raise AmbiguousPluginError(f"{kind} {name!r} is published by {len(usable)} packages: write {qualified}.")
        return self._permitted((usable or named)[0])

    def _permitted(self, entry: Entry) -> Entry:
        if entry in self._refused:
            raise RefusedPluginError(f"{entry.origin} is {self._refused[entry]}.")
        return entry

    def _unknown(self, kind: str, name: str, *, look_inside: bool) -> UnknownPluginError:
        instead = self._retired(kind).get(name) if look_inside else None
        if instead:
            return UnknownPluginError(f"{kind}={name!r} is not installed: {instead}")
        names = self.names(kind)
        known = names + [e.qualified for e in self.entries(kind)]
        others = [e.kind for e in self.entries() if name in (e.name, e.qualified) and e.kind != kind]
        hint = f" It is the name of {article(others[0])}." if others else closest(name, known)
        return UnknownPluginError(f"{kind}={name!r} is not installed.{hint} Installed: {', '.join(names) or 'none'}.")

    def _retired(self, kind: str) -> dict[str, str]:
        retired: dict[str, str] = {}
        for entry in self.entries(kind):
            try:
                retired.update(self.describe(entry).retired)
            except PluginLoadError:
                continue  # broken; reported when it is requested
        return retired

    def describe(self, entry: Entry) -> Plugin:
        """Import and return the descriptor of `entry`.

        Raises:
            PluginLoadError: naming the distribution, whatever its module did on import.
            RefusedPluginError: if it must not be imported.
        """
        if entry not in self._descriptors:
            self._descriptors[entry] = self._load(self._permitted(entry))
        return self._descriptors[entry]

    def _load(self, entry: Entry) -> Plugin:
        from plugframe.hooks.descriptor import API, Plugin  # a listing does without

        descriptor = _import(entry.value, entry, "descriptor")
        module, _, name = entry.value.partition(":")
        if is_submodule(module, name):
            # Python sets a submodule as attribute of its package, so a second lookup would find the module.
            raise PluginLoadError(
                f"{entry.origin} is broken: {entry.value} has the name of the module {module}.{name}, which takes its "
                "place once it is imported. Its author has to rename one of them."
            )
        if not isinstance(descriptor, Plugin):
            raise PluginLoadError(
                f"{entry.origin} is broken: {entry.value} is a {type(descriptor).__name__}, not a plugframe.Plugin. "
                f"Tell its author, or uninstall {entry.distribution}."
            )
        spoken = [number for number in (API, API - 1) if number > 0]
        if descriptor.api not in spoken:
            newer = "plugframe" if descriptor.api > API else entry.distribution
            raise PluginLoadError(
                f"{entry.origin} speaks version {descriptor.api} of the plugin contract, this plugframe speaks "
                f"{' and '.join(map(str, spoken))}: type 'pip install --upgrade {newer}'."
            )
        return descriptor

    def needs(self, entry: Entry) -> list[str]:
        """Return the distributions that `entry`'s extras require, from metadata alone."""
        if not entry.extras:
            return []
        if entry.distribution not in self._requirements:
            self._requirements[entry.distribution] = requires(entry.distribution)
        needed: list[str] = []
        for requirement in self._requirements[entry.distribution]:
            marker = re.search(r"extra\s*==\s*['\"]([^'\"]+)['\"]", requirement)
            if marker and marker.group(1) in entry.extras:
                match = re.match(r"[A-Za-z0-9._-]+", requirement)
                if match:
                    needed.append(match.group(0))
        return needed

    def missing(self, entry: Entry) -> list[str]:
        """Return those of `needs` that are not installed."""
        return [name for name in self.needs(entry) if not installed(name)]

    def absent(self, entry: Entry) -> str | None:
        """Return the missing dependencies of `entry` and how to install them; None if there are none."""
        descriptor = self.describe(entry)
        modules = [name for name in descriptor.requires if not importable(name)]
        absent = list(dict.fromkeys([*modules, *self.missing(entry)]))
        if not absent:
            return None
        what = ", ".join(absent)
        own = f"{entry.distribution}[{','.join(entry.extras)}]" if entry.extras else what
        extra = descriptor.extra or own
        return f"{what}: type \"pip install '{extra}'\""

    def require(self, entries: Iterable[Entry]) -> None:
        """Check that all dependencies of these are installed, without importing them.

        Raises:
            MissingDependencyError: for the first that lacks something, saying what to install.
        """
        for entry in entries:
            absent = self.absent(entry)
            if absent:
                raise MissingDependencyError(f"{entry.origin} needs {absent}.")

    def factory(self, entry: Entry) -> Any:
        """Import and return the factory of the implementation.

        Raises:
            MissingDependencyError: saying what to install.
            PluginLoadError: naming the distribution and what its module did on import.
        """
        descriptor = self.describe(entry)
        self.require([entry])
        return _import(descriptor.factory, entry, "factory")

    def make(self, entry: Entry, options: Mapping[str, Any] | None = None) -> Any:
        """Call the factory of `entry`; see `factory`.

        Raises:
            PluginLoadError: naming the distribution and what its factory raised.
        """
        descriptor = self.describe(entry)
        factory = self.factory(entry)
        try:
            return factory(**{**descriptor.preset, **(options or {})})
        except (KeyboardInterrupt, PlugframeError):
            raise
        except BaseException as error:
            raise PluginLoadError(
                f"{entry.origin} is broken: {descriptor.factory} raised {_words(error)}. "
                f"Fix or uninstall {entry.distribution}."
            ) from error


def _import(reference: str, entry: Entry, what: str) -> Any:
    module_name, _, attribute = reference.partition(":")
    if not attribute:
        raise PluginLoadError(
            f"{entry.origin} is broken: its {what} {reference!r} names no object; its author has to write "
            "'package.module:name'."
        )
    try:
        value: Any = importlib.import_module(module_name)
        for part in attribute.split("."):
            value = getattr(value, part)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        # SystemExit and pytest.skip are BaseExceptions too: one broken package must not end the program.
        raise PluginLoadError(
            f"{entry.origin} is broken: its {what} {reference} failed to import with "
            f"{_words(error)}. Fix or uninstall {entry.distribution}."
        ) from error
    return value


def _words(error: BaseException) -> str:
    """Return an exception as one line without a final full stop, to be embedded in a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"
