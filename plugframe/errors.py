"""Every error a user can meet.

::

    PlugframeError
    ├── UsageError                    a wrong value or a call out of order (also a ValueError)
    │   ├── SettingError              a setting has a wrong value, or two sources contradict each other
    │   ├── UnknownPluginError        no plugin of that name is installed
    │   ├── AmbiguousPluginError      two distributions publish that name
    │   ├── RefusedPluginError        it is installed, and disabled or not on the list of allowed ones
    │   ├── UnsupportedError          an installed plugin cannot do what was asked here
    │   └── OrderError                a call came too early, too late or twice (also a RuntimeError)
    ├── PluginError                   a plugin is broken; the message names its distribution
    │   ├── PluginLoadError           its descriptor or factory cannot be imported
    │   ├── PluginContractError       it breaks the contract: a hook missing, doubled or not a wrapper
    │   └── MissingDependencyError    what it needs is not installed; the message says how to install it
    ├── EnvironmentMismatchError      what the cluster says contradicts what was asked
    ├── CollectiveMismatchError       the ranks called a collective with different shapes or dtypes
    ├── RankLostError                 another rank has gone in the middle of a collective; says what all did last
    │   └── CollectiveTimeoutError    a rank did not come to a collective in time (also a TimeoutError)
    ├── OutOfSyncError                what should be equal on all ranks is not; names the first that differs
    ├── CheckpointError               a checkpoint cannot be written or read
    │   ├── CheckpointCorruptError    what lies on disk is not what was written
    │   ├── CheckpointUnfinishedError its save never ended: what is written last is not there
    │   ├── CheckpointMismatchError   it is whole, but does not fit the objects it is loaded into
    │   └── CheckpointURLError        a URL was given to a format that writes to paths of the file system
    ├── RankFailedError               a rank raised, died or left early; holds its report
    └── PlugframeWarning              (a UserWarning) something asked for has no effect

``UsageError`` is what the command line turns into one line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

from plugframe._printable import printable


class PlugframeError(Exception):
    """Base of all errors raised by plugframe.

    Its text may name keys of a file or repeat what another rank said: control characters in it are escaped, so that
    no text reaches a terminal as a command to it.
    """

    def __init__(self, *args: object) -> None:
        super().__init__(*(printable(each) if isinstance(each, str) else each for each in args))


class UsageError(PlugframeError, ValueError):
    """The person at the keyboard can fix this."""


class SettingError(UsageError):
    """A setting has a wrong value, or two sources of settings contradict each other."""


class UnknownPluginError(UsageError):
    """No installed plugin has that name."""


class AmbiguousPluginError(UsageError):
    """Two distributions publish that name and the bare name was used."""


class RefusedPluginError(UsageError):
    """That plugin is installed, and disabled or not on the list of those that are allowed."""


class UnsupportedError(UsageError):
    """An installed plugin cannot do what was asked of it here."""


class OrderError(UsageError, RuntimeError):
    """A call came too early, too late or twice."""


class PluginError(PlugframeError):
    """A plugin is broken."""


class PluginLoadError(PluginError):
    """A plugin's descriptor or factory cannot be imported."""


class PluginContractError(PluginError):
    """A plugin breaks the contract of its kind."""


class MissingDependencyError(PluginError, UsageError):
    """What a plugin needs is not installed."""


class EnvironmentMismatchError(UsageError):
    """What the cluster or launcher says contradicts what was asked."""


class CollectiveMismatchError(PlugframeError, RuntimeError):
    """The ranks called one collective with different shapes, dtypes or structures."""


class RankLostError(PlugframeError, RuntimeError):
    """The connection to another rank was lost in a collective; the message says what every rank did last.

    Attributes:
        blamed: which rank is to blame: "rank", "host", "text" (where every rank is), its "stack", and whether it is
            "alive"; None if there is no telling.
    """

    def __init__(self, message: str, *, blamed: Mapping[str, object] | None = None) -> None:
        super().__init__(message)
        self.blamed = blamed

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_lost, (type(self), str(self), self.blamed))


def _rank_lost(cls: type[RankLostError], message: str, blamed: Mapping[str, object] | None) -> RankLostError:
    return cls(message, blamed=blamed)


class CollectiveTimeoutError(RankLostError, TimeoutError):
    """A rank did not come to a collective in time; the message says where every rank is."""


class OutOfSyncError(PlugframeError, RuntimeError):
    """Parameters or the state of an optimizer differ between ranks."""


class CheckpointError(PlugframeError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointCorruptError(CheckpointError):
    """What lies on disk is not what was written."""


class CheckpointUnfinishedError(CheckpointError):
    """The save of a checkpoint never ended: what is written last, and makes it one, is not there."""


class CheckpointMismatchError(CheckpointError):
    """A whole checkpoint does not fit the objects it is loaded into."""


class CheckpointURLError(CheckpointError):
    """A URL was given to a checkpoint format that writes to paths of the file system."""


class RankFailedError(PlugframeError, RuntimeError):
    """A rank raised, was killed or left early.

    Attributes:
        report: the text for the terminal: rank, host, cause, traceback.
        exit_code: what the process that supervises should exit with (128 + n for signal n).
    """

    def __init__(self, report: str, *, exit_code: int = 1) -> None:
        super().__init__(report)
        self.report = printable(report)
        self.exit_code = exit_code

    def _render_traceback_(self) -> list[str]:
        """Tell a notebook what to show: the frames between the cell and the ranks say nothing."""
        return self.report.splitlines()

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_failed, (self.report, self.exit_code))


def _rank_failed(report: str, exit_code: int) -> RankFailedError:
    return RankFailedError(report, exit_code=exit_code)


class PlugframeWarning(UserWarning):
    """Something that was asked for has no effect, or something was left to chance."""


def closest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the closest of `known`, or an empty string."""
    names = {name.lower(): name for name in known}
    match = difflib.get_close_matches(str(word).strip().lower(), list(names), n=1, cutoff=0.5)
    return f" Did you mean {names[match[0]]!r}?" if match else ""


def article(noun: str) -> str:
    """Return a noun with its article, for a message."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def shown(value: object) -> str:
    """Return the text of a setting in a message, which is one line: an object by its class."""
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(shown, value))}]"
    if isinstance(value, (str, int, float)):
        return repr(value)
    return value.__name__ if isinstance(value, type) else type(value).__name__
