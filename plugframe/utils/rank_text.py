"""Format ranks for messages."""

from __future__ import annotations

from collections.abc import Iterable

#: Maximum number of numbers and ranges before the rest is abbreviated.
_MAX_ITEMS = 8


def ranks_text(ranks: Iterable[int]) -> str:
    """Format ranks for a message.

    Examples: ``rank 3``, ``ranks 0 and 1``, ``ranks 0, 2-7 and 9``, ``ranks 0, 2, 4, 6, 8, 10, 12, 14 and 24 more``.
    """
    ranges: list[list[int]] = []
    for rank in sorted(ranks):
        if ranges and rank == ranges[-1][-1] + 1:
            ranges[-1].append(rank)
        else:
            ranges.append([rank])
    items: list[tuple[str, int]] = []
    for each in ranges:
        # Two consecutive ranks are listed, not shown as a range.
        items += [(f"{each[0]}-{each[-1]}", len(each))] if len(each) > 2 else [(str(rank), 1) for rank in each]
    *first, last = [item for item, _ in items[:_MAX_ITEMS]]
    more = sum(count for _, count in items[_MAX_ITEMS:])
    if more:
        first, last = [*first, last], f"{more} more"
    plural = "s" if sum(map(len, ranges)) > 1 else ""
    return f"rank{plural} {', '.join(first)} and {last}" if first else f"rank{plural} {last}"
