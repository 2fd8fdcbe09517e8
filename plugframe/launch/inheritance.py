"""Hide the environment of a rank from programs that the rank starts.

Environment variables hold a rank's position in its job and the settings of its command line, and every program that
it starts inherits them. A process that acts as a rank therefore marks itself in a variable with its process id. A
`Lite` in another process that finds the mark removes the rank's variables from its environment.
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

from plugframe.core.config.request import FIELDS, variable
from plugframe.core.registry.registry import Registry
from plugframe.errors import OrderError, PluginError
from plugframe.hooks.spelling import variable_of
from plugframe.hooks.variables import FROM_COMMAND_LINE, JOB_SEED, LAUNCHED, MEETING, PATIENT, RANK, TOKEN


class RankEnvironment:
    """The rank variables of one `Lite`: removes those of a parent rank, and marks this process as their owner.

    Args:
        unpickled: the `Lite` was pickled by a rank into another process, such as a DataLoader worker: there it keeps
            the rank's variables, to report which rank that process works for.

    Attributes:
        parent: process id of the rank that started this program, directly or indirectly; None without one.
        helper: whether this process works for the rank `parent` and is not a rank itself.
    """

    def __init__(self, *, unpickled: bool = False) -> None:
        self._process = os.getpid()
        self._removed: dict[str, str] = {}
        self._claimed = False
        mark = _mark(os.environ)
        self.parent: int | None = None if mark is None or _is_me(mark) else mark["pid"]
        self.helper = unpickled and self.parent is not None
        if mark is not None and self.parent is not None and not self.helper:
            self._removed = remove_inherited(mark, os.environ)

    def claim(self, patterns: Iterable[Iterable[str]]) -> None:
        """Mark this process as a rank.

        Args:
            patterns: for each environment, the names of the variables that hold a rank's position.
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
        """Check that this process may join a job, before it sets anything up.

        Raises:
            OrderError: if this process is a helper of a rank: it would take the rank's place in collectives.
        """
        if self.helper:
            raise OrderError(
                f"{call}() in a helper process of a rank (process {self.parent}): a Lite sent to another process "
                "reports the rank's position, but cannot join its job. Call it in the rank, or create a Lite here."
            )
        if self.parent is not None and not launched:
            from plugframe.utils.logging import tell  # imports torch, which the command line avoids

            tell(
                f"this program was started by a rank of another job (process {self.parent}) and runs independently: "
                "it ignores that job's variables and command line"
            )

    def close(self) -> None:
        """Restore the variables."""
        if os.getpid() != self._process:
            return  # a forked copy
        mark = _mark(os.environ)
        if self._claimed and mark is not None and _is_me(mark):
            if mark["holders"] > 1:
                os.environ[RANK] = json.dumps({**mark, "holders": mark["holders"] - 1})
            else:
                text = os.environ.pop(RANK)
                # A hack: the mark stays in the C library's environment, which children inherit, while `os.environ`
                # is restored.
                os.putenv(RANK, text)
        for name, value in self._removed.items():
            os.environ.setdefault(name, value)
        self._claimed, self._removed = False, {}


def remove_inherited(mark: Mapping[str, Any], environ: Any) -> dict[str, str]:
    """Remove the variables that a rank has passed down from `environ`, and return them.

    Variables of a launcher stay if one of them has changed since: then that launcher has run again.
    """
    names = [name for name, value in mark["settings"].items() if environ.get(name) == value]
    for place in mark["places"]:
        if all(environ.get(name, value) == value for name, value in place.items()):
            names += place
    removed = {name: environ.pop(name) for name in dict.fromkeys([*names, RANK]) if name in environ}
    return removed


def discard_parent_rank() -> None:
    """Remove the variables of a parent rank from this process's environment."""
    mark = _mark(os.environ)
    if mark is not None and not _is_me(mark):
        remove_inherited(mark, os.environ)


@contextmanager
def unmarked() -> Iterator[None]:
    """Hide the mark of this process from processes that are ranks themselves."""
    before = os.environ.pop(RANK, None)
    os.unsetenv(RANK)  # also the one that `RankEnvironment.close` leaves
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
    """Return the start time of this process, to detect reused process ids; empty if unknown."""
    if sys.platform != "linux":
        return ""
    with suppress(OSError):
        return Path("/proc/self/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[19]
    return ""


def _settings(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables set by the job's command line, without those the user has set."""
    typed = environ.get(FROM_COMMAND_LINE, "").split(",")
    names = [FROM_COMMAND_LINE, LAUNCHED, PATIENT, MEETING, TOKEN, JOB_SEED]
    names += [variable(word) for word in typed if word in FIELDS]
    names += [variable_of(word) for word in typed if word.startswith("--")]
    return {name: environ[name] for name in names if name in environ}


def _matching(environ: Mapping[str, str], patterns: Iterable[str]) -> dict[str, str]:
    patterns = tuple(patterns)
    return {name: value for name, value in environ.items() if any(fnmatchcase(name, each) for each in patterns)}


def own_variables(registry: Registry) -> Iterator[tuple[str, ...]]:
    """Yield, for each installed environment, the names of the variables that hold a rank's position."""
    for entry in registry.entries("environment"):
        with suppress(PluginError):  # a broken package is reported when it is selected
            descriptor = registry.describe(entry)
            yield tuple(descriptor.own_variables or descriptor.variables)
