"""The plugin policy: plugins that are disabled, or not on a list of allowed ones, are never imported."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from plugframe.core.config.files import POLICY_KEYS, find_file, read_file
from plugframe.core.registry.entry_points import OWN_DISTRIBUTION, Entry, normalize
from plugframe.errors import SettingError, closest
from plugframe.hooks.variables import ALLOW, DISABLE, FROM_COMMAND_LINE

OPTION = "--disable-plugin"
#: How the variable that names what a command line set marks one plugin that it disabled.
MARK = "disable="


@dataclass(frozen=True)
class Disabled:
    """A disabled plugin or package.

    Attributes:
        word: a name, a package, or ``package:name``.
        source: where that is said, in words for a message.
        by: who said it.
    """

    word: str
    source: str
    by: Literal["command", "variable", "file"]

    def hits(self, entry: Entry) -> bool:
        """Return whether it applies to `entry`."""
        return entry.name == self.word or entry.of(self.word)


@dataclass(frozen=True)
class Allowed:
    """A list of packages and plugins that may be used besides plugframe's own, with its source."""

    words: tuple[str, ...]
    source: str


@dataclass(frozen=True)
class Policy:
    """The plugins that are never imported. If there are several lists of allowed plugins, each must allow a plugin."""

    disabled: tuple[Disabled, ...] = ()
    allowed: tuple[Allowed, ...] = ()

    def refusal(self, entry: Entry) -> str:
        """Return why a plugin is refused and how to change that; empty if it is allowed."""
        for each in self.disabled:
            if each.hits(entry):
                return f"disabled by {each.word!r} in {each.source}: take it out there to use this"
        for each_list in () if entry.builtin else self.allowed:
            if not any(entry.of(word) for word in each_list.words):
                is_name = entry.name in each_list.words
                hint = f", where {entry.name!r} is taken for a package" if is_name else ""
                return f"not allowed: add {entry.distribution!r} to {each_list.source}{hint}"
        return ""

    def check(self, entries: Iterable[Entry]) -> None:
        """Check that the plugins that a command line disables exist.

        Raises:
            SettingError: if it is not, with the closest match: what was meant would be used.
        """
        for text in self._unknown(entries, "command"):
            raise SettingError(text)

    def notes(self, entries: Iterable[Entry]) -> tuple[str, ...]:
        """Return warnings for words from other sources that disable nothing: a shared list may contain some."""
        return self._unknown(entries, "variable", "file")

    def _unknown(self, entries: Iterable[Entry], *by: str) -> tuple[str, ...]:
        entries = tuple(entries)
        unknown = [d for d in self.disabled if d.by in by and not any(d.hits(entry) for entry in entries)]
        if not unknown:
            return ()
        known = {word for entry in entries for word in (entry.name, entry.distribution, entry.qualified)}
        return tuple(
            f"{each.word!r} is disabled in {each.source}, and no plugin or package of that name is installed."
            f"{closest(each.word, sorted(known))}"
            for each in unknown
        )


def read_policy(environ: Mapping[str, str], folder: Path | None = None) -> Policy:
    """Read the policy from the environment and the settings file.

    Args:
        environ: the environment variables.
        folder: where the search for a settings file starts; the working directory.

    Raises:
        SettingError: if one of them cannot be understood. Then nothing may be imported.
    """
    path = find_file(environ, folder or Path.cwd())
    data = (read_file(path) if path else None) or {}
    filed = {key: _words(data[key], f"{key} in {path}") for key in POLICY_KEYS if key in data}
    marks = environ.get(FROM_COMMAND_LINE, "").split(",")
    disabled = [
        Disabled(word, f"the command line ({OPTION})", "command")
        if f"{MARK}{word}" in marks
        else Disabled(word, f"the environment variable {DISABLE}", "variable")
        for word in split(environ.get(DISABLE, ""), DISABLE)
    ]
    disabled += [Disabled(word, f"disable in {path}", "file") for word in filed.get("disable", ())]
    for each in disabled:
        if normalize(each.word) == OWN_DISTRIBUTION:
            raise SettingError(
                f"{each.word!r} is disabled in {each.source}: that is all of plugframe itself. Name one of its plugins."
            )
    allowed = [Allowed(filed["allow"], f"allow in {path}")] if "allow" in filed else []
    if environ.get(ALLOW):
        allowed.append(Allowed(split(environ[ALLOW], ALLOW), f"the environment variable {ALLOW}"))
    return Policy(tuple(disabled), tuple(allowed))


def split(text: str, source: str) -> tuple[str, ...]:
    """Return the words of a list separated by commas.

    Raises:
        SettingError: for a word that names no plugin and no package.
    """
    return _words([part.strip() for part in text.split(",") if part.strip()], source)


def _words(value: Any, source: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(word, str) for word in value):
        raise SettingError(f"{source} is {value!r}: it is a list of names, such as ['acme-ddp', 'acme-io:zarr'].")
    for word in value:
        if not re.fullmatch(r"[^\s,:*?\[\]]+(:[^\s,:*?\[\]]+)?", word):
            raise SettingError(f"{source} holds {word!r}: write a package, or package:name, in full.")
    return tuple(value)
