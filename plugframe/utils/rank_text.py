"""Ranks in messages."""

from __future__ import annotations

from collections.abc import Iterable

#: Numbers and ranges that are spelled out.
_MOST_WORDS = 8


def ranks_text(ranks: Iterable[int]) -> str:
    """Return ranks for a message.

    Examples: ``rank 3``, ``ranks 0 and 1``, ``ranks 0, 2-7 and 9``, ``ranks 0, 2, 4, 6, 8, 10, 12, 14 and 24 more``.
    """
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    words: list[tuple[str, int]] = []
    for each in ranges:
        # Two in a row are no range yet.
        words += [(f"{each[0]}-{each[-1]}", len(each))] if len(each) > 2 else [(str(rank), 1) for rank in each]
    *first, last = [word for word, _ in words[:_MOST_WORDS]]
    more = sum(count for _, count in words[_MOST_WORDS:])
    if more:
        first, last = [*first, last], f"{more} more"
    plural = "s" if sum(map(len, ranges)) > 1 else ""
    return f"rank{plural} {', '.join(first)} and {last}" if first else f"rank{plural} {last}"
