"""Read the entry points of installed distributions from metadata, without importing them."""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple
from urllib.parse import unquote

from plugframe._compat import distributions

PREFIX = "plugframe."
OWN_DISTRIBUTION = "plugframe"
#: Entry points of this kind are commands of the command line rather than plugins.
COMMAND = "command"
#: Name and version of a distribution whose metadata an interrupted install or removal left incomplete.
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Entry:
    """A published plugin name, from the metadata of its distribution.

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
        """The unique name: ``distribution:name``."""
        return f"{self.distribution}:{self.name}"

    @property
    def builtin(self) -> bool:
        """Whether it is part of plugframe."""
        return normalize(self.distribution) == OWN_DISTRIBUTION

    @property
    def origin(self) -> str:
        """The plugin and its package, for messages: ``strategy 'acme' (acme-ddp 1.2)``."""
        return f"{self.kind} {self.name!r} ({self.distribution} {self.version})"

    def of(self, word: str) -> bool:
        """Return whether `word` is its package, or its package and name: ``"acme-ddp"``, ``"acme-ddp:acme"``."""
        distribution, _, name = word.partition(":")
        return normalize(distribution) == normalize(self.distribution) and name in ("", self.name)


@functools.cache
def normalize(distribution: str) -> str:
    """Return a distribution's normalized name (PEP 503)."""
    return re.sub(r"[-_.]+", "-", distribution).lower()


class Published(NamedTuple):
    """The entry points of the distributions on the path; of two distributions with one name the first counts.

    Except of those that call themselves plugframe: the one that this module belongs to counts.

    Attributes:
        entries: every plugin and command.
        impostor: where a distribution is that calls itself plugframe and is another, which has come before the real
            one on the path, or is the only one with metadata; empty if there is none.
    """

    entries: tuple[Entry, ...]
    impostor: str


def published() -> Published:
    """Read the metadata of every distribution on the path."""
    return _published(tuple((place, *_state(place)) for place in sys.path))


@functools.lru_cache(maxsize=1)
def _published(places: tuple[tuple[str, int, int], ...]) -> Published:
    """Read all metadata, cached until the path or one of its folders changes."""
    seen: set[str] = set()
    found: list[Entry] = []
    instead: tuple[str, list[Entry]] | None = None
    for distribution in distributions():
        name, version = name_and_version(distribution)
        if name != UNKNOWN and normalize(name) in seen:
            continue
        entries = [
            Entry(kind, point, value, name, version, extras) for kind, point, value, extras in _points(distribution)
        ]
        if normalize(name) == OWN_DISTRIBUTION and not _is_this(distribution):
            instead = instead or (str(distribution.locate_file("")), entries)
            continue
        seen.add(normalize(name))
        found += entries
    if instead is not None and OWN_DISTRIBUTION not in seen:
        # Run from a folder that is not installed: fall back to the installed distribution of this name.
        found += instead[1]
    return Published(tuple(dict.fromkeys(found)), "" if instead is None else instead[0])


def _is_this(distribution: Any) -> bool:
    """Return whether a distribution contains the running package, or is an editable installation of it."""
    import json

    import plugframe

    package = os.path.dirname(os.path.abspath(plugframe.__file__))
    try:
        origin = json.loads(_text(distribution, "direct_url.json") or "{}")
        if origin.get("dir_info", {}).get("editable"):
            folder = os.path.join(unquote(origin["url"].removeprefix("file://")), OWN_DISTRIBUTION)
        else:
            folder = str(distribution.locate_file(OWN_DISTRIBUTION))
        return os.path.samefile(folder, package)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _state(place: str) -> tuple[int, int]:
    try:
        found = os.stat(place or os.curdir)
    except OSError:
        return 0, 0
    return found.st_ino, found.st_mtime_ns


def _points(distribution: Any) -> Iterator[tuple[str, str, str, tuple[str, ...]]]:
    """Yield kind, name, value and extras of every entry point of ours, well-formed or not."""
    text = _text(distribution, "entry_points.txt")
    if f"[{PREFIX}" not in text.replace(" ", ""):
        return
    group = ""
    for line in map(str.strip, text.splitlines()):
        name, equals, value = line.partition("=")
        if line.startswith("["):
            group = line.strip("[] ")
        elif equals and group.startswith(PREFIX) and not line.startswith(("#", ";")):
            value, _, extras = value.partition("[")
            yield group[len(PREFIX) :], name.strip(), value.replace(" ", ""), tuple(re.findall(r"[\w.-]+", extras))


def name_and_version(distribution: Any) -> tuple[str, str]:
    """Return a distribution's name, without parsing its metadata, which can contain a long README."""
    texts = (_text(distribution, name) for name in ("METADATA", "PKG-INFO", ""))
    head = next(filter(None, texts), "").partition("\n\n")[0]
    name, version = (re.search(rf"^{field}:[ \t]*(\S+)", head, re.MULTILINE) for field in ("Name", "Version"))
    return name[1] if name else UNKNOWN, version[1] if version else UNKNOWN


def _text(distribution: Any, name: str) -> str:
    try:
        return distribution.read_text(name) or ""
    except (OSError, UnicodeDecodeError):
        return ""  # one damaged package must not hide all others
