"""Exception classes.

::

    PlugframeError
    ├── UsageError                    an invalid value or a call out of order (also a ValueError)
    │   ├── SettingError              a setting has an invalid value, or two sources contradict each other
    │   │   └── SettingTypeError      an argument has the wrong type (also a TypeError)
    │   ├── UnknownPluginError        no plugin of that name is installed
    │   ├── AmbiguousPluginError      two distributions publish that name
    │   ├── RefusedPluginError        the plugin is installed, but disabled or not allowed
    │   ├── UnsupportedError          a plugin does not support the request on this machine or with these settings
    │   └── OrderError                a call came too early, too late or twice (also a RuntimeError)
    ├── PluginError                   a plugin is broken; the message names its distribution
    │   ├── PluginLoadError           its descriptor or factory cannot be imported
    │   ├── PluginContractError       it breaks the contract: a hook is missing, duplicated or not a wrapper
    │   └── MissingDependencyError    a dependency is not installed; the message holds the install command
    ├── EnvironmentMismatchError      the cluster's variables contradict the requested settings
    ├── CollectiveMismatchError       the ranks called a collective with different shapes or dtypes
    ├── RankLostError                 the connection to another rank was lost in a collective
    │   └── CollectiveTimeoutError    a rank did not join a collective in time (also a TimeoutError)
    ├── OutOfSyncError                replicated values differ between ranks; names the first that differs
    ├── CheckpointError               a checkpoint cannot be written or read
    │   ├── CheckpointCorruptError    the files differ from what was written
    │   ├── CheckpointUnfinishedError the save was interrupted: the entry that is written last is missing
    │   ├── CheckpointMismatchError   it is intact, but does not fit the objects it is loaded into
    │   │   └── CheckpointKeyError    a key of the state is missing (also a KeyError)
    │   ├── CheckpointNotFoundError   there is nothing at the path (also a FileNotFoundError)
    │   └── CheckpointURLError        a URL was passed to a format that writes to file system paths
    ├── RankFailedError               a rank raised, died or left early; holds its report
    └── PlugframeWarning              (a UserWarning) a requested setting has no effect

The command line reports a ``UsageError`` in one line and exits with code 2.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping

#: Control characters (C0 and C1, so every escape sequence), marks that turn the direction of text or end a line in
#: disguise, and halves of surrogate pairs, which no terminal can be sent.
_HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_HARMFUL_IN_LINE = re.compile(_HARMFUL.pattern[:-1] + "\t\n]")


class PlugframeError(Exception):
    """Base of all errors raised by plugframe.

    Control characters in the message are escaped: it may quote keys of a file or text from another rank, which must
    not reach a terminal as commands.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in args))


class UsageError(PlugframeError, ValueError):
    """Base of errors that the user can fix in a command, a setting or a script."""


class SettingError(UsageError):
    """A setting has an invalid value, or two sources of settings contradict each other."""


class SettingTypeError(SettingError, TypeError):
    """An argument has the wrong type."""


class UnknownPluginError(UsageError):
    """No installed plugin has that name."""


class AmbiguousPluginError(UsageError):
    """Two distributions publish that name, and it was used unqualified."""


class RefusedPluginError(UsageError):
    """The plugin is installed, but disabled or not on the list of allowed plugins."""


class UnsupportedError(UsageError):
    """A plugin does not support the request on this machine or with these settings."""


class OrderError(UsageError, RuntimeError):
    """A call came too early, too late or twice."""


class PluginError(PlugframeError):
    """A plugin is broken."""


class PluginLoadError(PluginError):
    """A plugin's descriptor or factory cannot be imported."""


class PluginContractError(PluginError):
    """A plugin breaks the contract of its kind."""


class MissingDependencyError(PluginError, UsageError):
    """A dependency of a plugin is not installed."""


class EnvironmentMismatchError(UsageError):
    """The variables of the cluster or launcher contradict the requested settings."""


class CollectiveMismatchError(PlugframeError, RuntimeError):
    """The ranks called one collective with different shapes, dtypes or structures."""


class RankLostError(PlugframeError, RuntimeError):
    """The connection to another rank was lost in a collective; the message lists the last call of every rank.

    Attributes:
        blamed: the rank at fault: "rank", "host", "text" (the position of every rank), its "stack", and whether it is
            "alive"; None if it could not be determined.
    """

    def __init__(self, message: str, *, blamed: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_lost, (type(self), str(self), self.blamed))


def _rank_lost(cls: type[RankLostError], message: str, blamed: Mapping[str, object] | None) -> RankLostError:
    return cls(message, blamed=blamed)


class CollectiveTimeoutError(RankLostError, TimeoutError):
    """A rank did not join a collective in time; the message lists the position of every rank."""


class OutOfSyncError(PlugframeError, RuntimeError):
    """Parameters or optimizer states differ between ranks."""


class CheckpointError(PlugframeError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointCorruptError(CheckpointError):
    """The files of a checkpoint differ from what was written."""


class CheckpointUnfinishedError(CheckpointError):
    """The save was interrupted: the entry that is written last, and completes a checkpoint, is missing."""


class CheckpointMismatchError(CheckpointError):
    """An intact checkpoint does not fit the objects it is loaded into."""


class CheckpointKeyError(CheckpointMismatchError, KeyError):
    """A checkpoint lacks a key of the state it is loaded into, or a state lacks a key that was asked for."""

    __str__ = Exception.__str__  # KeyError's shows the repr of the message


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is nothing at the path of a checkpoint."""


class CheckpointURLError(CheckpointError):
    """A URL was passed to a checkpoint format that writes to file system paths."""


class RankFailedError(PlugframeError, RuntimeError):
    """A rank raised, was killed or left early.

    Attributes:
        report: the text for the terminal: rank, host, cause, traceback.
        exit_code: exit code for the supervising process (128 + n for signal n).
    """

    def __init__(self, report: str, *, exit_code: int = 1) -> None:
        super().__init__(report)
        self.report = printable(report)
        self.exit_code = exit_code

    def _render_traceback_(self) -> list[str]:
        """Return the lines a notebook shows: the frames between the cell and the ranks carry no information."""
        return self.report.splitlines()

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_failed, (self.report, self.exit_code))


def _rank_failed(report: str, exit_code: int) -> RankFailedError:
    return RankFailedError(report, exit_code=exit_code)


class PlugframeWarning(UserWarning):
    """A requested setting has no effect, or a result is not reproducible."""


def closest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the closest of `known`, or an empty string."""
    names = {name.lower(): name for name in known}
    match = difflib.get_close_matches(str(word).strip().lower(), list(names), n=1, cutoff=0.5)
    return f" Did you mean {names[match[0]]!r}?" if match else ""


def article(noun: str) -> str:
    """Return a noun with its indefinite article."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def shown(value: object) -> str:
    """Return a setting's value as one line for a message; an object is shown as its class."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, (str, int, float)):
        return repr(value)
    return value.__name__ if isinstance(value, type) else type(value).__name__


def printable(text: str, *, one_line: bool = False) -> str:
    """Return `text` with every control character escaped as in a Python string: ``"\\x1b[2J"``.

    Calling it twice changes nothing more.

    Args:
        text: from anywhere.
        one_line: escape newlines and tabs as well, for a cell of a table or a name within a sentence.
    """
    pattern = _HARMFUL_IN_LINE if one_line else _HARMFUL
    return pattern.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def names_text(names: object, *, limit: int = 0) -> str:
    """Return names from a file, joined by commas; of more than `limit` only the first, with how many there are."""
    listed = [printable(str(name), one_line=True) for name in names]  # type: ignore[attr-defined]
    if limit and len(listed) > limit:
        return f"{', '.join(listed[:limit])}, … ({len(listed)} in all)"
    return ", ".join(listed)


def printable_cause(error: BaseException) -> BaseException | None:
    """Return `error` for ``raise … from``; None if its text would reach the terminal raw, in the traceback."""
    seen: BaseException | None = error
    while seen is not None:
        if printable(str(seen)) != str(seen):
            return None
        seen = seen.__cause__ or seen.__context__
    return error
