"""Which rank brought the job down, and what is said about it: once."""

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

#: Signals that the launcher itself sends.
_FROM_LAUNCHER = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT})
#: How long after the first failure a cause may still be told, after its consequences were.
_WINDOW_S = 10.0
#: Characters of what is said of a rank that is not the culprit.
_MAX_FATE = 120
_OUT_OF_MEMORY = ", out of memory: the kernel chose it"


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How one rank ended.

    Attributes:
        rank: its global rank.
        exit_code: as `subprocess` has it, negative for a signal; None where it is not known.
        time: when, in seconds since the epoch; None where it is not known.
        words: what its error file holds, if it left one.
        crash: the stack it left when it crashed.
        by_launcher: the launcher killed it because it would not leave.
    """

    rank: int
    exit_code: int | None = None
    time: float | None = None
    words: Mapping[str, Any] | None = None
    crash: str = ""
    by_launcher: bool = False


@dataclass(frozen=True, kw_only=True)
class Report:
    """What is said about a failure.

    Attributes:
        text: who failed and of what in one line, the traceback of that rank, and a line on the others.
        exit_code: for the launcher to leave with.
        certain: False if what failed only noticed that somebody else had gone.
        time: when, in seconds since the epoch.
        others_failed: whether ranks beside the culprit failed by themselves, in another way.
    """

    text: str
    exit_code: int
    certain: bool
    time: float
    others_failed: bool = False


def report(endings: Sequence[Ending], *, host: str, out_of_memory: bool = False) -> Report:
    """Name the culprit among `endings`: all ranks of this node, first those whose failure torch noticed first."""
    culprit = min(endings, key=_order(endings))
    blamed = _blamed(culprit)
    if blamed is None:
        line = f"rank {culprit.rank} on {host} {_cause(culprit, out_of_memory)}"
        parts = [line, _stack(culprit).rstrip(), *_others(endings, culprit)]
    else:
        line = f"rank {blamed['rank']} on {blamed['host'] or host} did not come: {blamed['text']}"
        told = [ending for ending in endings if ending.rank != blamed["rank"]]
        parts = [line, f"It is at:\n{blamed['stack']}" if blamed["stack"] else "", *_others(told, None)]
    return Report(
        text="\n".join(part for part in parts if part),
        exit_code=_exit_code(culprit),
        # A rank that is elsewhere, and says so, has not gone because of another one.
        certain=_order(endings)(culprit)[0] < _Suspicion.NOTICED or (blamed is not None and blamed["alive"]),
        time=culprit.time or time.time(),
        others_failed=any(_failed_alone(ending, culprit) for ending in endings),
    )


def _failed_alone(ending: Ending, culprit: Ending) -> bool:
    words = ending.words
    if ending is culprit or words is None or is_consequence(words) or "SystemExit" in words["types"]:
        return False
    return culprit.words is None or _message(words) != _message(culprit.words)


def _blamed(culprit: Ending) -> Mapping[str, Any] | None:
    """Return what the likeliest culprit knows of another rank that it waited for until the timeout."""
    if culprit.words is None or not is_consequence(culprit.words):
        return None
    blamed: Mapping[str, Any] | None = culprit.words.get("blamed")
    return None if blamed is None or blamed["rank"] == culprit.rank else blamed


def culprit_of(endings: Sequence[Ending]) -> Ending | None:
    """Return the rank that brought the others down, None if that may be one of which nothing is known."""
    if not endings:
        return None
    culprit, *others = sorted(endings, key=_order(endings))
    if _order(endings)(culprit)[0] is _Suspicion.UNKNOWN:
        return None
    certain = _order(endings)(culprit)[0] < _Suspicion.INTERRUPTED
    return culprit if certain or all(other.exit_code is not None for other in others) else None


def _order(endings: Sequence[Ending]) -> Callable[[Ending], tuple[_Suspicion, float]]:
    first = min((e.time for e in endings if e.words is not None and e.time is not None), default=None)
    return lambda ending: (_suspicion(ending, first), ending.time or 0.0)


class _Suspicion(enum.IntEnum):
    """How likely an ending is the cause of the others, the likeliest first."""

    CRASHED = 0  # nobody dies of SIGKILL or SIGSEGV because another rank failed
    RAISED = 1
    LEFT = 2
    ABORTED = 3  # a library may do so when it notices a dead peer
    NOTICED = 4
    LATE = 5
    INTERRUPTED = 6
    TERMINATED = 7
    ENDED = 8
    UNKNOWN = 9


def _suspicion(ending: Ending, first: float | None) -> _Suspicion:
    if ending.words is not None:
        if is_consequence(ending.words):
            return _Suspicion.NOTICED
        late = first is not None and ending.time is not None and ending.time > first + _WINDOW_S
        return _Suspicion.LATE if late else _Suspicion.RAISED
    code = ending.exit_code
    if code is None:
        return _Suspicion.UNKNOWN
    if ending.by_launcher or code == 0:
        return _Suspicion.ENDED
    if code > 0:
        return _Suspicion.INTERRUPTED if code == 128 + signal.SIGINT else _Suspicion.LEFT
    if -code in _FROM_LAUNCHER:
        return _Suspicion.TERMINATED
    return _Suspicion.ABORTED if -code == signal.SIGABRT else _Suspicion.CRASHED


def is_consequence(words: Mapping[str, Any]) -> bool:
    """Say whether an error only tells that the connection to another rank was lost."""
    said = _told(words)
    return bool(NETWORK_TYPES.intersection(words["types"])) or any(t in said for t in (*LOST_TEXTS, *LATE_TEXTS))


def mark(ending: Ending) -> tuple[Any, ...] | None:
    """Return what tells an exception of the script's from others: also where it came from, and after which step.

    None for what may come of anything: a signal, or a connection that was lost.
    """
    words = ending.words
    if words is None or is_consequence(words) or "SystemExit" in words["types"]:
        return None
    places = [line for line in _told(words).splitlines() if line.lstrip().startswith("File ")]
    return (_message(words), *places[-1:], words["step"])


def summary(ending: Ending) -> str:
    """Return what is said of a rank between two attempts: ``ValueError: message``."""
    return _cause(ending, False).removeprefix("failed: ")


def _message(words: Mapping[str, Any]) -> str:
    return str(words["message"]["message"])


def _told(words: Mapping[str, Any]) -> str:
    return str(words["message"]["extraInfo"]["py_callstack"])


def _cause(ending: Ending, out_of_memory: bool) -> str:
    if ending.words is not None:
        if "SystemExit" in ending.words["types"]:
            said = f": {ending.words['said']}" if ending.words["said"] else ""
            return f"left with exit code {ending.words['exit_code']}{said}"
        return f"failed: {_message(ending.words)}"
    code = ending.exit_code
    if code is None:
        return "ended without a word"
    if code >= 0:
        return f"left with exit code {code}"
    return f"was killed by {_signal_name(-code)}{_OUT_OF_MEMORY if out_of_memory and -code == signal.SIGKILL else ''}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _stack(ending: Ending) -> str:
    if ending.words is not None:
        return _told(ending.words)
    return ending.crash


def _exit_code(ending: Ending) -> int:
    if ending.words is not None:
        return int(ending.words["exit_code"]) or 1
    code = ending.exit_code
    if code is None:
        return 1
    return 128 - code if code < 0 else code or 1


def _others(endings: Iterable[Ending], culprit: Ending | None) -> list[str]:
    """Return one line for each thing that became of other ranks: ``ranks 0, 2-7: ended by the launcher``."""
    fates: dict[str, list[int]] = {}
    for ending in endings:
        if ending is not culprit:
            fate = _fate(ending)
            if culprit is not None and ending.words is not None and fate == _cause(culprit, False):
                fate = "failed alike"
            fates.setdefault(fate, []).append(ending.rank)
    return [f"{ranks_text(ranks)}: {fate}" for fate, ranks in fates.items()]


def _fate(ending: Ending) -> str:
    if ending.words is not None:
        if is_consequence(ending.words):
            return f"{textwrap.shorten(_message(ending.words), _MAX_FATE)} (a consequence)"
        return _cause(ending, False)
    code = ending.exit_code
    if code == 0:
        return "had ended well"
    if code is None or ending.by_launcher or -code in _FROM_LAUNCHER or code == 128 + signal.SIGINT:
        return "ended by the launcher"
    return _cause(ending, False)
