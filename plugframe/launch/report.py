"""Report a failed job once: the rank that caused the failure, and the outcome of the others."""

from __future__ import annotations

import enum
import signal
import textwrap
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from plugframe.utils.lost_rank import LATE_TEXTS, LOST_TEXTS, NETWORK_TYPES
from plugframe.utils.rank_text import ranks_text

#: Signals that the launcher sends.
_FROM_LAUNCHER = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
#: Time after the first error within which a later error may still be the cause.
_WINDOW_S = 10.0
#: Maximum length of the outcome of a rank that is not the culprit.
_MAX_OUTCOME_CHARS = 120
_OUT_OF_MEMORY = ", out of memory (kernel OOM killer)"


@dataclass(frozen=True, kw_only=True)
class RankExit:
    """How one rank exited.

    Attributes:
        rank: its global rank.
        exit_code: as in `subprocess`, negative for a signal; None if unknown.
        time: time of the exit in seconds since the epoch; None if unknown.
        error: content of its error file, None without one.
        crash_stack: its stack, if it crashed.
        killed_by_launcher: whether the launcher killed it because it did not stop.
    """

    rank: int
    exit_code: int | None = None
    time: float | None = None
    error: Mapping[str, Any] | None = None
    crash_stack: str = ""
    killed_by_launcher: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """Report of a failed job.

    Attributes:
        text: one line with the failed rank and its error, its traceback, and lines on the other ranks.
        exit_code: exit code for the launcher.
        certain: False if the failed rank only detected the loss of another one.
        time: time of the failure in seconds since the epoch.
        others_failed: whether other ranks failed independently, with another error.
    """

    text: str
    exit_code: int
    certain: bool
    time: float
    others_failed: bool = False


def report(exits: Sequence[RankExit], *, host: str, out_of_memory: bool = False) -> Report:
    """Return the report for the `exits` of all ranks of this node; failures come first, in torch's order."""
    culprit = min(exits, key=_order(exits))
    blamed = _blamed(culprit)
    if blamed is None:
        line = f"rank {culprit.rank} on {host} {_cause(culprit, out_of_memory)}"
        sections = [line, _stack(culprit).rstrip(), *_others(exits, culprit)]
    else:
        line = f"rank {blamed['rank']} on {blamed['host'] or host} did not reach a collective: {blamed['text']}"
        others = [rank_exit for rank_exit in exits if rank_exit.rank != blamed["rank"]]
        heading = f"Stack of rank {blamed['rank']}:"
        stack = f"{heading}\n{blamed['stack']}" if blamed["stack"] else ""
        sections = [line, stack, *_others(others, None)]
    return Report(
        text="\n".join(section for section in sections if section),
        exit_code=_exit_code(culprit),
        # A rank that responded from elsewhere has not exited because of another one.
        certain=_order(exits)(culprit)[0] < _Suspicion.LOST_PEER or (blamed is not None and blamed["alive"]),
        time=culprit.time or time.time(),
        others_failed=any(_failed_alone(rank_exit, culprit) for rank_exit in exits),
    )


def _failed_alone(rank_exit: RankExit, culprit: RankExit) -> bool:
    error = rank_exit.error
    if rank_exit is culprit or error is None or is_consequence(error) or "SystemExit" in error["types"]:
        return False
    return culprit.error is None or _message(error) != _message(culprit.error)


def _blamed(culprit: RankExit) -> Mapping[str, Any] | None:
    """Return the `blamed` record of the likeliest culprit: the rank it waited for until the timeout."""
    if culprit.error is None or not is_consequence(culprit.error):
        return None
    blamed: Mapping[str, Any] | None = culprit.error.get("blamed")
    return None if blamed is None or blamed["rank"] == culprit.rank else blamed


def find_culprit(exits: Sequence[RankExit]) -> RankExit | None:
    """Return the rank that caused the failure; None if it may be a rank with an unknown exit code."""
    if not exits:
        return None
    culprit, *others = sorted(exits, key=_order(exits))
    if _order(exits)(culprit)[0] is _Suspicion.UNKNOWN:
        return None
    certain = _order(exits)(culprit)[0] < _Suspicion.INTERRUPTED
    return culprit if certain or all(other.exit_code is not None for other in others) else None


def _order(exits: Sequence[RankExit]) -> Callable[[RankExit], tuple[_Suspicion, float]]:
    first = min((e.time for e in exits if e.error is not None and e.time is not None), default=None)
    return lambda rank_exit: (_suspicion(rank_exit, first), rank_exit.time or 0.0)


class _Suspicion(enum.IntEnum):
    """How likely an exit is the cause of the others, most likely first."""

    CRASHED = 0  # SIGKILL and SIGSEGV are never consequences of another rank's failure
    RAISED = 1
    EXITED = 2
    ABORTED = 3  # libraries may abort when they detect a lost peer
    LOST_PEER = 4
    LATE = 5
    INTERRUPTED = 6
    TERMINATED = 7
    SUCCEEDED = 8
    UNKNOWN = 9


def _suspicion(rank_exit: RankExit, first: float | None) -> _Suspicion:
    if rank_exit.error is not None:
        if is_consequence(rank_exit.error):
            return _Suspicion.LOST_PEER
        late = first is not None and rank_exit.time is not None and rank_exit.time > first + _WINDOW_S
        return _Suspicion.LATE if late else _Suspicion.RAISED
    code = rank_exit.exit_code
    if code is None:
        return _Suspicion.UNKNOWN
    if rank_exit.killed_by_launcher or code == 0:
        return _Suspicion.SUCCEEDED
    if code > 0:
        return _Suspicion.INTERRUPTED if code == 128 + signal.SIGINT else _Suspicion.EXITED
    if -code in _FROM_LAUNCHER:
        return _Suspicion.TERMINATED
    return _Suspicion.ABORTED if -code == signal.SIGABRT else _Suspicion.CRASHED


def is_consequence(error: Mapping[str, Any]) -> bool:
    """Return whether an error only reports the loss of another rank."""
    text = _traceback(error)
    return bool(NETWORK_TYPES.intersection(error["types"])) or any(t in text for t in (*LOST_TEXTS, *LATE_TEXTS))


def failure_key(rank_exit: RankExit) -> tuple[Any, ...] | None:
    """Return a key that identifies a script's exception: message, origin and optimizer step.

    None for exits with other possible causes: a signal, or a lost connection.
    """
    error = rank_exit.error
    if error is None or is_consequence(error) or "SystemExit" in error["types"]:
        return None
    origins = [line for line in _traceback(error).splitlines() if line.lstrip().startswith("File ")]
    return (_message(error), *origins[-1:], error["step"])


def summary(rank_exit: RankExit) -> str:
    """Return a one-line description for the message on a restart: ``ValueError: message``."""
    return _cause(rank_exit, False).removeprefix("failed: ")


def _message(error: Mapping[str, Any]) -> str:
    return str(error["message"]["message"])


def _traceback(error: Mapping[str, Any]) -> str:
    return str(error["message"]["extraInfo"]["py_callstack"])


def _cause(rank_exit: RankExit, out_of_memory: bool) -> str:
    if rank_exit.error is not None:
        if "SystemExit" in rank_exit.error["types"]:
            reason = f": {rank_exit.error['said']}" if rank_exit.error["said"] else ""
            return f"exited with code {rank_exit.error['exit_code']}{reason}"
        return f"failed: {_message(rank_exit.error)}"
    code = rank_exit.exit_code
    if code is None:
        return "exited with an unknown code"
    if code >= 0:
        return f"exited with code {code}"
    return f"was killed by {_signal_name(-code)}{_OUT_OF_MEMORY if out_of_memory and -code == signal.SIGKILL else ''}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stack(rank_exit: RankExit) -> str:
    if rank_exit.error is not None:
        return _traceback(rank_exit.error)
    return rank_exit.crash_stack


def _exit_code(rank_exit: RankExit) -> int:
    if rank_exit.error is not None:
        return int(rank_exit.error["exit_code"]) or 1
    code = rank_exit.exit_code
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


def _others(exits: Iterable[RankExit], culprit: RankExit | None) -> list[str]:
    """Return one line for each outcome of other ranks: ``ranks 0 and 2-7: stopped by the launcher``."""
    outcomes: dict[str, list[int]] = {}
    for rank_exit in exits:
        if rank_exit is not culprit:
            outcome = _outcome(rank_exit)
            if culprit is not None and rank_exit.error is not None and outcome == _cause(culprit, False):
                outcome = "failed with the same error"
            outcomes.setdefault(outcome, []).append(rank_exit.rank)
    return [f"{ranks_text(ranks)}: {outcome}" for outcome, ranks in outcomes.items()]


def _outcome(rank_exit: RankExit) -> str:
    if rank_exit.error is not None:
        if is_consequence(rank_exit.error):
            return f"{textwrap.shorten(_message(rank_exit.error), _MAX_OUTCOME_CHARS)} (a consequence)"
        return _cause(rank_exit, False)
    code = rank_exit.exit_code
    if code == 0:
        return "had finished"
    if code is None or rank_exit.killed_by_launcher or -code in _FROM_LAUNCHER or code == 128 + signal.SIGINT:
        return "stopped by the launcher"
    return _cause(rank_exit, False)
