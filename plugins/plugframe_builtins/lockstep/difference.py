"""Describe the difference between the ranks' calls, and the likely mistake."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from plugframe.diagnostics.call_log import Call
from plugframe.diagnostics.likely_causes import loop_left, source, under_rank_condition, under_swallowing
from plugframe.utils.rank_text import ranks_text


@dataclass(frozen=True)
class RankCall:
    """One rank's next call.

    Attributes:
        call: the call.
        batches: number read so far with gradients enabled.
        forwards: number started so far with gradients enabled.
    """

    call: Call
    batches: int
    forwards: int

    def as_list(self) -> list[Any]:
        """Return a JSON-compatible list."""
        return [*asdict(self.call).values(), self.batches, self.forwards]

    @staticmethod
    def of(data: list[Any]) -> RankCall:
        """Return the inverse of `as_list`."""
        *call, batches, forwards = data
        return RankCall(Call(*call), batches, forwards)

    @property
    def does(self) -> tuple[Any, ...]:
        """The fields that must be equal on all ranks, whatever the source line."""
        call = self.call
        return call.number, call.hook, call.name, call.what, self.batches, self.forwards

    @property
    def text(self) -> str:
        """The call for display, with its source line."""
        line = source(self.call)
        return f"{self.call.text}{f' {line!r}' if line else ''}"


def difference(words: Mapping[int, RankCall], *, sites: bool) -> str:
    """Return a line about the difference between ranks; an empty string if there is none."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for rank, word in words.items():
        where = (word.call.site,) if sites else ()
        groups.setdefault((*word.does, *where), []).append(rank)
    if len(groups) < 2:
        return ""
    firsts = {ranks[0]: words[ranks[0]] for ranks in groups.values()}
    calls = {(word.call.hook, word.call.name, word.call.what, word.call.site) for word in firsts.values()}
    counted = len(calls) < len(firsts)
    clauses = []
    for ranks in groups.values():
        word = firsts[ranks[0]]
        after = f" after {_counts(word)}" if counted else ""
        clauses.append(f"{ranks_text(ranks)}: {word.text}{after}")
    hint = _hint(firsts)
    return f"The ranks do not make the same call: {'; '.join(clauses)}. {hint}"


def _counts(word: RankCall) -> str:
    batches = f"{word.batches} batch{'es' if word.batches != 1 else ''}"
    return f"{batches} and {word.forwards} forward{'s' if word.forwards != 1 else ''}"


def _hint(firsts: Mapping[int, RankCall]) -> str:
    (a_rank, a), (b_rank, b) = list(firsts.items())[:2]
    for word in firsts.values():
        where = under_rank_condition(word.call)
        if where:
            return f"{word.call.name} stands under {where}, so that not every rank calls it: move it out."
    for (left_rank, left), (in_rank, inside) in (((b_rank, b), (a_rank, a)), ((a_rank, a), (b_rank, b))):
        loop = loop_left(inside.call, left.call)
        if loop:
            return (
                f"Rank {left_rank} has left {loop}, in which rank {in_rank} still is: different numbers of batches or "
                "steps?"
            )
    ahead = a_rank if (a.batches, a.forwards) > (b.batches, b.forwards) else b_rank
    for rank in (ahead, a_rank, b_rank):
        swallowed = under_swallowing(firsts[rank].call)
        if swallowed:
            return f"Has {swallowed} passed over an exception on rank {rank}?"
    if (a.batches, a.forwards) != (b.batches, b.forwards):
        return f"Rank {ahead} has gone on without a call that the other has made: was it skipped there?"
    if a.call.name == b.call.name and a.call.what != b.call.what:
        return "Every rank must pass the same shape, dtype and operation (pad what differs, or gather it as an object)."
    return "Every rank must make the same calls in the same order."
