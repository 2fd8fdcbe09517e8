"""Keep what belongs to a rank from the programs that the rank starts.

A rank's place in its job and the settings of its command line stand in environment variables, which every program that
it starts inherits. So a process that acts as a rank says so in a variable of its own, with its process id; a `Lite` in
another process that finds it takes the rank's variables out of its environment and starts afresh.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from plugframe.core.config.options import variable_of
from plugframe.core.config.request import FIELDS, variable
from plugframe.core.registry.registry import Registry
from plugframe.errors import OrderError, PluginError
from plugframe.hooks.variables import FROM_COMMAND_LINE, JOB_SEED, LAUNCHED, MEETING, PATIENT, RANK, TOKEN


class Place:
    """The variables of one `Lite`: those of a parent rank are taken out, those of this rank are marked as its own.

    Args:
        travelled: the `Lite` was pickled by a rank into another process, a loader's worker say: there it keeps the
            rank's place, to say which rank that process works for.

    Attributes:
        parent: process id of the rank that this program, or a program before it, was started by; None without one.
        helper: whether this process works for the rank `parent`, and is none itself.
    """

    def __init__(self, *, travelled: bool = False) -> None:
        self._process = os.getpid()
        self._taken: dict[str, str] = {}
        self._claimed = False
        mark = _mark(os.environ)
        self.parent: int | None = None if mark is None or _is_me(mark) else mark["pid"]
        self.helper = travelled and self.parent is not None
        if mark is not None and self.parent is not None and not self.helper:
            self._taken = take_out(mark, os.environ)

    def claim(self, patterns: Iterable[Iterable[str]]) -> None:
        """Mark this process as a rank.

        Args:
            patterns: for each environment the names of the variables that tell a rank its place.
        """
        if self.helper or self._claimed:
            return
        self._claimed = True
        mark = _mark(os.environ)
        if mark is None or not _is_me(mark):
            mark = {
                "pid": os.getpid(),
                "started": _started(),
                "settings": _settings(os.environ),
                "places": list(filter(None, (_matching(os.environ, names) for names in patterns))),
                "holders": 0,
            }
        os.environ[RANK] = json.dumps({**mark, "holders": mark["holders"] + 1})

    def check(self, call: str, *, launched: bool) -> None:
        """Say that this program does not belong to the job of the rank that started it, before it sets anything up.

        Raises:
            OrderError: if this process works for a rank: it would come to the collectives in that one's place.
        """
        if self.helper:
            raise OrderError(
                f"{call}() in a helper of a rank (process {self.parent}): a Lite that was sent to another process "
                "tells the rank's place, and joins nothing. Call it in the rank, or make a Lite in this process."
            )
        if self.parent is not None and not launched:
            from plugframe.utils.logging import tell  # with torch, for which a command line does not wait

            tell(
                f"this program was started by a rank of another job (process {self.parent}) and runs by itself: that "
                "job's variables and command line do not count here"
            )

    def close(self) -> None:
        """Put the variables back as they were."""
        if os.getpid() != self._process:
            return  # a forked copy
        mark = _mark(os.environ)
        if self._claimed and mark is not None and _is_me(mark):
            if mark["holders"] > 1:
                os.environ[RANK] = json.dumps({**mark, "holders": mark["holders"] - 1})
            else:
                text = os.environ.pop(RANK)
                # A hack: it is still true for programs that are started from here on, and they find it in what the C
                # library keeps, while `os.environ` is as it was.
                os.putenv(RANK, text)
        for name, value in self._taken.items():
            os.environ.setdefault(name, value)
        self._claimed, self._taken = False, {}


def take_out(mark: Mapping[str, Any], environ: Any) -> dict[str, str]:
    """Remove from `environ` what a rank has handed down without wanting to; return it.

    Variables of a launcher stay if one of them has another value than the rank had: then that launcher has run again.
    """
    names = [name for name, value in mark["settings"].items() if environ.get(name) == value]
    for place in mark["places"]:
        if all(environ.get(name, value) == value for name, value in place.items()):
            names += place
    taken = {name: environ.pop(name) for name in dict.fromkeys([*names, RANK]) if name in environ}
    return taken


def start_afresh() -> None:
    """Remove from this process's environment what a rank that started it has handed down."""
    mark = _mark(os.environ)
    if mark is not None and not _is_me(mark):
        take_out(mark, os.environ)


@contextmanager
def unmarked() -> Iterator[None]:
    """Start processes that are ranks themselves, although this one may be a rank of another job."""
    before = os.environ.pop(RANK, None)
    os.unsetenv(RANK)  # also what `Place.close` has left
    try:
        yield
    finally:
        if before is not None:
            os.environ[RANK] = before


def _mark(environ: Mapping[str, str]) -> dict[str, Any] | None:
    with suppress(ValueError):
        mark = json.loads(environ.get(RANK, ""))
        if isinstance(mark, dict) and {"pid", "started", "settings", "places", "holders"} <= mark.keys():
            return mark
    return None


def _is_me(mark: Mapping[str, Any]) -> bool:
    return bool(mark["pid"] == os.getpid() and mark["started"] == _started())


def _started() -> str:
    """Return when this process was started, so that it is not mistaken for another that had its number."""
    if sys.platform != "linux":
        return ""
    with suppress(OSError):
        return Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return ""


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that carry what was typed for the job; what the user has set by hand is left out."""
    typed = environ.get(FROM_COMMAND_LINE, "").split(",")
    names = [FROM_COMMAND_LINE, LAUNCHED, PATIENT, MEETING, TOKEN, JOB_SEED]
    names += [variable(word) for word in typed if word in FIELDS]
    names += [variable_of(word) for word in typed if word.startswith("--")]
    return {name: environ[name] for name in names if name in environ}


def _matching(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    patterns = tuple(patterns)
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, each) for each in patterns)}


def own_variables(registry: Registry) -> Iterator[tuple[str, ...]]:
    """Yield, for each environment that is installed, the names of the variables that tell a rank its place."""
    for entry in registry.entries("environment"):
        with suppress(PluginError):  # a broken package is reported where it is asked for
            descriptor = registry.describe(entry)
            yield tuple(descriptor.own_variables or descriptor.variables)
