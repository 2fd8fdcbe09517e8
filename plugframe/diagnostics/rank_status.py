"""Status of each rank, and the diagnosis from the status of all ranks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plugframe.diagnostics import likely_causes, messages
from plugframe.diagnostics.call_log import Call
from plugframe.utils.rank_text import ranks_text


@dataclass(frozen=True, kw_only=True)
class RankStatus:
    """Status of one rank.

    Attributes:
        rank: its global rank.
        host: its host name.
        running: the innermost running call, None if there is none.
        waited_s: time in seconds that this call has taken so far.
        last: the latest call that has ended, None if there is none.
        activity: activity outside of calls: ``"in forward (model.py:31)"``; empty if unknown.
        stack: formatted stack.
        shut_down: whether it has torn down its job.
        error: the exception it shut down with, in one line.
    """

    rank: int
    host: str
    running: Call | None = None
    waited_s: float = 0.0
    last: Call | None = None
    activity: str = ""
    stack: str = ""
    shut_down: bool = False
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return a dict of JSON values."""
        return asdict(self)

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> RankStatus:
        """Return the status that `as_dict` was called on."""
        calls = {name: None if data[name] is None else Call(**data[name]) for name in ("running", "last")}
        return RankStatus(**{**data, **calls})


@dataclass(frozen=True)
class Diagnosis:
    """Diagnosis from the status of all ranks.

    Attributes:
        text: one line: the status of every rank, and a likely cause.
        places: `text` without the likely cause.
        culprit: the rank that did not reach the call, None if unknown.
    """

    text: str
    culprit: int | None
    places: str = ""


def diagnose(statuses: Mapping[int, RankStatus | None], rank: int, *, seconds: float) -> Diagnosis:
    """Diagnose which rank did not reach the call that `rank` is in.

    Args:
        statuses: by rank; None for a rank that did not respond.
        rank: the rank that runs the diagnosis.
        seconds: how long it has waited for responses.
    """
    culprit = _culprit(statuses, rank)
    # The call that others wait in tells why one rank makes another: this rank may be the one that does.
    order = sorted(statuses, key=lambda number: (number == culprit, number != rank))
    running = [status.running for status in map(statuses.get, order) if status is not None and status.running]
    here = running[0] if running else None
    clauses: dict[str, list[int]] = {}
    for number, status in sorted(statuses.items()):
        clauses.setdefault(_clause(status, seconds), []).append(number)
    text = "; ".join(_sentence(numbers, clause) for clause, numbers in clauses.items())
    hint = _hint(statuses, culprit, here)
    return Diagnosis(f"{text}.{f' {hint}' if hint else ''}", culprit, f"{text}.")


def _culprit(statuses: Mapping[int, RankStatus | None], rank: int) -> int | None:
    calls = _calls(statuses)
    mine = calls.get(rank)
    if mine is not None and mine.peer is not None:
        return messages.awaited(calls, rank)
    others = {number: status for number, status in statuses.items() if number != rank}
    for suspicious in (
        lambda status: status is not None and status.shut_down,
        lambda status: status is None,
        lambda status: status is not None and status.running is None,
    ):
        found = [number for number, status in others.items() if suspicious(status)]
        if found:
            return min(found)
    places: dict[tuple[Any, ...], list[int]] = {}
    for number, status in statuses.items():
        call = status.running if status is not None else None
        if status is not None:
            place = (-1, status.activity) if call is None else (call.number, call.hook, call.name, call.what)
            places.setdefault(place, []).append(number)
    if len(places) < 2:
        return None
    # A minority has diverged; of two groups of one size, the one that is behind.
    return min(places.items(), key=lambda place: (len(place[1]), place[0][0], -place[1][0]))[1][0]


def _calls(statuses: Mapping[int, RankStatus | None]) -> dict[int, Call | None]:
    return {number: None if status is None else status.running for number, status in statuses.items()}


def _clause(status: RankStatus | None, seconds: float) -> str:
    if status is None:
        return f"did not respond within {seconds:g} s (it died, is stopped, or a thread holds the GIL)"
    last = f", {{its}} last collective was {status.last.text}" if status.last is not None else ""
    if status.shut_down:
        failed = f" with {status.error.rstrip('.')}" if status.error else ""
        where = f" {status.activity}" if status.activity else ""
        return f"{{has}} shut down{where}{failed}{last}"
    if status.running is not None:
        return f"{{waits}} in {status.running.text}"
    return f"{{is}} {status.activity or 'elsewhere'}{last}"


def _sentence(ranks: Sequence[int], clause: str) -> str:
    words = ("is", "has", "wait", "their") if len(ranks) > 1 else ("is", "has", "waits", "its")
    words = ("are", "have", "wait", "their") if len(ranks) > 1 else words
    clause = clause.replace("{is}", words[0]).replace("{has}", words[1]).replace("{waits}", words[2])
    return f"{ranks_text(ranks)} {clause.replace('{its}', words[3])}"


def _hint(statuses: Mapping[int, RankStatus | None], culprit: int | None, here: Call | None) -> str:
    status = None if culprit is None else statuses[culprit]
    if status is not None and status.error:
        return ""
    calls = _calls(statuses)
    if any(call is not None and call.peer is not None for call in calls.values()):
        return messages.hint(calls)
    if culprit is None:
        return "All ranks are in the same call: check the network and the devices."
    if here is None or status is None:
        return ""
    where = likely_causes.under_rank_condition(here)
    if where:
        return f"{here.name} is under {where}, so that not every rank calls it: move it out."
    loop = likely_causes.in_loop(here)
    if status.shut_down and loop:
        return f"Rank {culprit} may have left {loop} early: check that all ranks have the same number of batches."
    call = status.running or status.last
    swallowed = likely_causes.under_swallowing(call) if call is not None else ""
    if swallowed:
        return f"Check whether {swallowed} caught an exception on rank {culprit}."
    if status.running is not None:
        for inside, after in ((here, status.running), (status.running, here)):
            loop = likely_causes.loop_left(inside, after)
            if loop:
                return f"One of them has left {loop}: check that all ranks have the same number of batches."
        where = likely_causes.under_rank_condition(status.running)
        if where:
            return f"{status.running.name} is under {where}, so that not every rank calls it: move it out."
        return "Every rank must make the same calls in the same order."
    return ""
