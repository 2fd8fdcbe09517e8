"""What is installed: names, from distribution metadata; descriptors and factories, only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from plugframe._compat import metadata
from plugframe.errors import (
    AmbiguousPluginError,
    MissingDependencyError,
    PlugframeError,
    PluginLoadError,
    UnknownPluginError,
    closest,
)
from plugframe.hooks.descriptor import API, Plugin

PREFIX = "plugframe."
OWN_DISTRIBUTION = "plugframe"


@dataclass(frozen=True)
class Entry:
    """One published name, as its distribution's metadata states it.

    Attributes:
        kind: ``"strategy"``, …
        name: what the user types.
        value: ``"module:attribute"`` of the descriptor.
        distribution: name of the package that publishes it.
        version: its version.
        extras: extras of that package the plugin needs.
    """

    kind: str
    name: str
    value: str
    distribution: str
    version: str
    extras: tuple[str, ...] = ()

    @property
    def qualified(self) -> str:
        """The name nobody else can publish: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def builtin(self) -> bool:
        """Whether it comes with plugframe itself."""
        return normalize(self.distribution) == OWN_DISTRIBUTION

    @property
    def origin(self) -> str:
        """For messages: ``strategy 'acme' (acme-ddp 1.2)``."""
        return f"{self.kind} {self.name!r} ({self.distribution} {self.version})"


def _points() -> list[tuple[Any, Any]]:
    """Return every entry point of ours with its distribution."""
    try:
        found = metadata.entry_points()
    except ValueError:
        # Newer readers refuse all points for the sake of a malformed one, which is listed as broken here.
        return _points_one_by_one()
    groups = sorted(group for group in found.groups if group.startswith(PREFIX))
    return [(point, point.dist) for group in groups for point in found.select(group=group)]


def _points_one_by_one() -> list[tuple[Any, Any]]:
    import configparser  # for the rare malformed package alone: a listing is to be quick

    found: list[tuple[Any, Any]] = []
    for distribution in metadata.distributions():
        text = distribution.read_text("entry_points.txt") or ""
        if PREFIX in text:
            parser = configparser.ConfigParser(delimiters=("=",), interpolation=None, strict=False)
            parser.optionxform = str  # type: ignore[assignment]  # names keep their case
            parser.read_string(text)
            groups = [group for group in parser.sections() if group.startswith(PREFIX)]
            found += [(_Point(g, name, value), distribution) for g in groups for name, value in parser.items(g)]
    return found


def name_and_version(distribution: Any) -> tuple[str, str]:
    try:
        about: Any = distribution.metadata if distribution else {}
    except FileNotFoundError:
        about = {}
    # What an interrupted install or removal left behind may have no metadata at all.
    return about.get("Name") or "unknown", about.get("Version") or "unknown"


class _Point(NamedTuple):
    """An entry point as it is written, well-formed or not."""

    group: str
    name: str
    value: str


def normalize(distribution: str) -> str:
    """Return a distribution's name in its normal form (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Registry:
    """The names of one environment. Nothing is imported to build it."""

    def __init__(self, entries: Iterable[Entry]) -> None:
        self._entries = sorted(entries, key=lambda e: (e.kind, not e.builtin, e.distribution, e.name))
        self._descriptors: dict[Entry, Plugin] = {}
        self._requirements: dict[str, list[str]] = {}

    @classmethod
    def discover(cls) -> Registry:
        """Read the metadata of every installed distribution."""
        entries = []
        published: dict[int, tuple[str, str]] = {}  # a distribution parses its metadata at each access
        for point, distribution in _points():
            if id(distribution) not in published:
                published[id(distribution)] = name_and_version(distribution)
            name, version = published[id(distribution)]
            value, _, extras = point.value.partition("[")
            entries.append(
                Entry(
                    kind=point.group[len(PREFIX) :],
                    name=point.name,
                    value=value.replace(" ", ""),
                    distribution=name,
                    version=version,
                    extras=tuple(re.findall(r"[\w.-]+", extras)),
                )
            )
        return cls(dict.fromkeys(entries))

    def entries(self, kind: str | None = None) -> list[Entry]:
        """Return what is installed, built-ins first; of one kind if given."""
        return [e for e in self._entries if kind is None or e.kind == kind]

    def names(self, kind: str) -> list[str]:
        """Return the names that select something as they stand, sorted."""
        return sorted({e.name for e in self.entries(kind)})

    def shadowed(self, entry: Entry) -> bool:
        """Say whether the bare name selects a built-in instead, so that only the qualified one reaches it."""
        return not entry.builtin and any(e.builtin and e.name == entry.name for e in self.entries(entry.kind))

    def find(self, kind: str, name: str) -> Entry:
        """Return the entry `name` stands for: a bare name, or one qualified by its distribution.

        Raises:
            UnknownPluginError: with the closest match and what is installed, or what replaces a retired name.
            AmbiguousPluginError: if two distributions publish it and none of them is plugframe.
        """
        distribution, colon, bare = name.rpartition(":")
        named = [e for e in self.entries(kind) if e.name == bare]
        if colon:
            named = [e for e in named if normalize(e.distribution) == normalize(distribution)]
        if not named:
            raise self._unknown(kind, name)
        if named[0].builtin or len(named) == 1:
            return named[0]
        qualified = " or ".join(repr(e.qualified) for e in named)
        raise AmbiguousPluginError(f"{kind} {name!r} is published by {len(named)} packages: write {qualified}.")

    def _unknown(self, kind: str, name: str) -> UnknownPluginError:
        instead = self._retired(kind).get(name)
        if instead:
            return UnknownPluginError(f"{kind}={name!r} no longer exists: {instead}")
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
                continue  # broken in its own right; reported when it is asked for
        return retired

    def describe(self, entry: Entry) -> Plugin:
        """Import and return the descriptor of `entry`.

        Raises:
            PluginLoadError: naming the distribution, whatever its module did on import.
        """
        if entry not in self._descriptors:
            self._descriptors[entry] = self._load(entry)
        return self._descriptors[entry]

    def _load(self, entry: Entry) -> Plugin:
        descriptor = _import(entry.value, entry, "descriptor")
        module, _, name = entry.value.partition(":")
        if hasattr(sys.modules.get(module), "__path__") and _importable(f"{module}.{name}"):
            # Python puts a submodule into its package under its name: the second look would find the module.
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
        """Return the distributions `entry`'s extras stand for, from metadata alone."""
        if not entry.extras:
            return []
        if entry.distribution not in self._requirements:
            self._requirements[entry.distribution] = metadata.requires(entry.distribution) or []
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
        return [name for name in self.needs(entry) if not _installed(name)]

    def absent(self, entry: Entry) -> str | None:
        """Say what `entry`'s descriptor needs that is not there and how to install it; None if all is."""
        descriptor = self.describe(entry)
        modules = [name for name in descriptor.requires if not _importable(name)]
        absent = list(dict.fromkeys([*modules, *self.missing(entry)]))
        if not absent:
            return None
        what = ", ".join(absent)
        own = f"{entry.distribution}[{','.join(entry.extras)}]" if entry.extras else what
        extra = descriptor.extra or own
        return f"{what}: type \"pip install '{extra}'\""

    def require(self, entries: Iterable[Entry]) -> None:
        """Check that everything these need is there, without importing any of it.

        Raises:
            MissingDependencyError: for the first that lacks something, saying what to install.
        """
        for entry in entries:
            absent = self.absent(entry)
            if absent:
                raise MissingDependencyError(f"{entry.origin} needs {absent}.")

    def make(self, entry: Entry, options: Mapping[str, Any] | None = None) -> Any:
        """Import the factory of `entry` and call it.

        Raises:
            MissingDependencyError: saying what to install.
            PluginLoadError: naming the distribution and what its factory raised.
        """
        descriptor = self.describe(entry)
        self.require([entry])
        factory = _import(descriptor.factory, entry, "factory")
        try:
            return factory(**{**descriptor.preset, **(options or {})})
        except (KeyboardInterrupt, PlugframeError):
            raise
        except BaseException as error:
            raise PluginLoadError(
                f"{entry.origin} is broken: {descriptor.factory} raised {_words(error)}. "
                f"Mend or uninstall {entry.distribution}."
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
            f"{_words(error)}. Mend or uninstall {entry.distribution}."
        ) from error
    return value


def article(noun: str) -> str:
    """Return a noun with its article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _words(error: BaseException) -> str:
    """Return an exception in one line, without the full stop that would double that of the message."""
    return f"{type(error).__name__}: {' '.join(str(error).split()).rstrip('.')}"


def _importable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - to find "a.b", a is imported, which may raise anything
        return False


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True
