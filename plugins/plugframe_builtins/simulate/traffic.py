"""Count simulated traffic."""

from __future__ import annotations

from collections import defaultdict

from plugframe.base import size_text


class Traffic:
    """Number of calls and bytes of this rank, by collective."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = defaultdict(int)
        self._bytes: dict[str, int] = defaultdict(int)

    def add(self, call: str, num_bytes: int) -> None:
        """Count one call."""
        self._calls[call] += 1
        self._bytes[call] += num_bytes

    def lines(self) -> list[str]:
        """Return a line per collective, by bytes in descending order."""
        kinds = sorted(self._calls, key=lambda kind: -self._bytes[kind])
        return [f"{kind} {size_text(self._bytes[kind])} in {self._calls[kind]} calls" for kind in kinds]
