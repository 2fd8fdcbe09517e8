"""Where each rank is, in its own words, and what follows from all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from plugframe.diagnostics import likely_causes
from plugframe.diagnostics.call_log import Call
from plugframe.utils.rank_text import ranks_text


@dataclass(frozen=True, kw_only=True)
class Account:
    """What one rank says of itself.

    Attributes:
        rank: its global rank.
        host: where it runs.
        running: the call it is in, None if it is in none.
        waited_s: for how long it is in it.
        last: the newest call that has ended, None if there is none.
        doing: what it does outside of calls: ``"in forward (model.py:31)"``; empty where it is not known.
        stack: where it is, for people.
        left: whether it has torn its job down.
        error: the exception it left with, in a line.
    """

    rank: int
    host: str
    running: Call | None = None
    waited_s: float = 0.0
    last: Call | None = None
    doing: str = ""
    stack: str = ""
    left: bool = False
    error: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as what JSON can hold."""
        return asdict(self)

    @staticmethod
    def of(data: Mapping[str, Any]) -> Account:
        """Make it of what `as_dict` gave."""
        calls = {name: None if data[name] is None else Call(**data[name]) for name in ("running", "last")}
        return Account(**{**data, **calls})


@dataclass(frozen=True)
class Finding:
    """What follows from the accounts of all ranks.

    Attributes:
        text: one line: who is where, and what the mistake may be.
        places: of it, who is where.
        culprit: the rank that did not come, None if there is no telling.
    """

    text: str
    culprit: int | None
    places: str = ""


def find(accounts: Mapping[int, Account | None], rank: int, *, seconds: float) -> Finding:
    """Say which rank did not come to the call that `rank` is in.

    Args:
        accounts: of every rank; None for one that did not answer.
        rank: the one that asks.
        seconds: how long the answers were waited for.
    """
    mine = accounts[rank]
    running = [account.running for account in (mine, *accounts.values()) if account is not None and account.running]
    here = running[0] if running else None
    culprit = _culprit(accounts, rank)
    clauses: dict[str, list[int]] = {}
    for number, account in sorted(accounts.items()):
        clauses.setdefault(_clause(account, seconds), []).append(number)
    told = "; ".join(_sentence(numbers, clause) for clause, numbers in clauses.items())
    hint = _hint(accounts, culprit, here)
    return Finding(f"{told}.{f' {hint}' if hint else ''}", culprit, f"{told}.")


def _culprit(accounts: Mapping[int, Account | None], rank: int) -> int | None:
    others = {number: account for number, account in accounts.items() if number != rank}
    for suspicious in (
        lambda account: account is not None and account.left,
        lambda account: account is None,
        lambda account: account is not None and account.running is None,
    ):
        found = [number for number, account in others.items() if suspicious(account)]
        if found:
            return min(found)
    places: dict[tuple[Any, ...], list[int]] = {}
    for number, account in accounts.items():
        call = account.running if account is not None else None
        if account is not None:
            place = (-1, account.doing) if call is None else (call.number, call.hook, call.name, call.what)
            places.setdefault(place, []).append(number)
    if len(places) < 2:
        return None
    # Those who are few have gone astray; of two, the one that is behind.
    return min(places.items(), key=lambda place: (len(place[1]), place[0][0], -place[1][0]))[1][0]


def _clause(account: Account | None, seconds: float) -> str:
    if account is None:
        return (
            f"did not answer within {seconds:g} s (it has died, was stopped, or something in it holds the "
            "interpreter's lock)"
        )
    last = f", {{its}} last collective was {account.last.text}" if account.last is not None else ""
    if account.left:
        failed = f" with {account.error.rstrip('.')}" if account.error else ""
        where = f" {account.doing}" if account.doing else ""
        return f"{{has}} left{where}{failed}{last}"
    if account.running is not None:
        return f"{{waits}} in {account.running.text}"
    return f"{{is}} {account.doing or 'elsewhere'}{last}"


def _sentence(ranks: Sequence[int], clause: str) -> str:
    words = ("is", "has", "wait", "their") if len(ranks) > 1 else ("is", "has", "waits", "its")
    words = ("are", "have", "wait", "their") if len(ranks) > 1 else words
    clause = clause.replace("{is}", words[0]).replace("{has}", words[1]).replace("{waits}", words[2])
    return f"{ranks_text(ranks)} {clause.replace('{its}', words[3])}"


def _hint(accounts: Mapping[int, Account | None], culprit: int | None, here: Call | None) -> str:
    if culprit is None:
        return "All ranks are in the same call: does the network or the device hang?"
    account = accounts[culprit]
    if here is None or account is None or account.error:
        return ""
    where = likely_causes.under_rank_condition(here)
    if where:
        return f"{here.name} stands under {where}, so that not every rank calls it: move it out."
    loop = likely_causes.in_loop(here)
    if account.left and loop:
        return f"Has rank {culprit} left {loop} earlier: different numbers of batches or steps?"
    theirs = account.running or account.last
    swallowed = likely_causes.under_swallowing(theirs) if theirs is not None else ""
    if swallowed:
        return f"Has {swallowed} passed over an exception on rank {culprit}?"
    if account.running is not None:
        for inside, after in ((here, account.running), (account.running, here)):
            loop = likely_causes.loop_left(inside, after)
            if loop:
                return f"One of them has left {loop}: different numbers of batches or steps?"
        where = likely_causes.under_rank_condition(account.running)
        if where:
            return f"{account.running.name} stands under {where}, so that not every rank calls it: move it out."
        return "Every rank must make the same calls in the same order."
    return ""
