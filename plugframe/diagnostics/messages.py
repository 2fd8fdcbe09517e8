"""Ranks that wait for each other in messages: sends and receives of two ranks."""

from __future__ import annotations

from collections.abc import Mapping

from plugframe.diagnostics.call_log import COUNTERPARTS, GROUP, Call
from plugframe.utils.rank_text import ranks_text

#: The running call of each rank, None for a rank outside of calls.
Calls = Mapping[int, Call | None]


def awaited(calls: Calls, rank: int) -> int | None:
    """Return the rank that `rank` waits for in a message, in the end; None if both its ranks are in the message.

    Rank 3 may receive from rank 2, which receives from rank 1, which computes: rank 3 waits for rank 1. Of ranks that
    wait for each other, the next one is returned.
    """
    chain = _chain(calls, rank)
    if chain[-1] not in chain[:-1]:
        return chain[-1]
    return None if _in_one_message(calls, _circle(chain)) else chain[1]


def hint(calls: Calls) -> str:
    """Return the likely mistake, in one sentence, if a rank waits in a message; else an empty string."""
    text = ""
    for rank, call in sorted(calls.items()):
        if call is None or call.peer is None:
            continue
        chain = _chain(calls, rank)
        last = calls.get(chain[-1])
        if chain[-1] in chain[:-1]:
            circle = _circle(chain)
            if not _in_one_message(calls, circle):
                return f"{ranks_text(sorted(circle)).capitalize()} wait for each other: {_fix(calls, circle)}."
            text = "Both ranks are in the message: check the network and the devices."
        elif last is not None:
            missing = getattr(calls[chain[-2]], "counterpart", "")
            return f"Rank {chain[-1]} calls {last.name} and no {missing} for rank {chain[-2]}: each send needs a recv."
    return text


def _chain(calls: Calls, rank: int) -> list[int]:
    """Return ranks that each wait for the next in a message; a circle ends with the rank it begins with."""
    chain = [rank]
    while (call := calls.get(chain[-1])) is not None and call.peer is not None:
        chain.append(call.peer)
        if call.peer in chain[:-1]:
            break
    return chain


def _circle(chain: list[int]) -> list[int]:
    return chain[chain.index(chain[-1]) : -1]


def _in_one_message(calls: Calls, circle: list[int]) -> bool:
    """Return whether two ranks that wait for each other make a send and its recv."""
    return _hooks(calls, circle) == set(COUNTERPARTS) and len(_groups(calls, circle)) == 1 and len(circle) == 2


def _fix(calls: Calls, circle: list[int]) -> str:
    hooks = _hooks(calls, circle)
    if hooks == set(COUNTERPARTS) and len(circle) == 2:
        return "give the send and its recv one group"
    return "let one send first" if hooks == {"collective_recv"} else "let one receive first, or use all_to_all"


def _hooks(calls: Calls, circle: list[int]) -> set[str]:
    return {call.hook for rank in circle if (call := calls[rank]) is not None}


def _groups(calls: Calls, circle: list[int]) -> set[bool]:
    return {call.what.endswith(GROUP) for rank in circle if (call := calls[rank]) is not None}
