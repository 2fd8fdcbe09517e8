"""What would have been sent."""

from __future__ import annotations

from collections import defaultdict

from plugframe.base import size_text


class Traffic:
    """Calls of collectives and the bytes this rank would have handed to each kind."""

    def __init__(self) -> None:
        self._calls: dict[str, int] = defaultdict(int)
        self._bytes: dict[str, int] = defaultdict(int)

    def add(self, call: str, num_bytes: int) -> None:
        """Count one call."""
        self._calls[call] += 1
        self._bytes[call] += num_bytes

    def lines(self) -> list[str]:
        """Return a line for each kind of call, the one with most bytes first."""
        kinds = sorted(self._calls, key=lambda kind: -self._bytes[kind])
        return [f"{kind} {size_text(self._bytes[kind])} in {self._calls[kind]} calls" for kind in kinds]
