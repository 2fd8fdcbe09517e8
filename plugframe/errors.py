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
    ├── CheckpointError               a checkpoint cannot be written or read
    │   ├── CheckpointCorruptError    what lies on disk is not what was written
    │   └── CheckpointMismatchError   it is whole, but does not fit the objects it is loaded into
    ├── RankFailedError               a rank raised, died or left early; holds its report
    └── PlugframeWarning              (a UserWarning) something asked for has no effect

``UsageError`` is what the command line turns into one line and exit code 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class PlugframeError(Exception):
    """Base of all errors raised by plugframe."""


class UsageError(PlugframeError, ValueError):
    """The person at the keyboard can mend this."""


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


class CheckpointError(PlugframeError, RuntimeError):
    """A checkpoint cannot be written or read."""


class CheckpointCorruptError(CheckpointError):
    """What lies on disk is not what was written."""


class CheckpointMismatchError(CheckpointError):
    """A whole checkpoint does not fit the objects it is loaded into."""


class RankFailedError(PlugframeError, RuntimeError):
    """A rank raised, was killed or left early.

    Attributes:
        report: the text for the terminal: rank, host, cause, traceback.
        exit_code: what the process that supervises should exit with (128 + n for signal n).
    """

    def __init__(self, report: str, *, exit_code: int = 1) -> None:
        super().__init__(report)
        self.report = report
        self.exit_code = exit_code

    def __reduce__(self) -> tuple[object, ...]:
        return (_rank_failed, (self.report, self.exit_code))


def _rank_failed(report: str, exit_code: int) -> RankFailedError:
    return RankFailedError(report, exit_code=exit_code)


class PlugframeWarning(UserWarning):
    """Something that was asked for has no effect, or something was left to chance."""


def closest(word: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` with the closest of `known`, or an empty string."""
    match = difflib.get_close_matches(str(word), list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""
