"""Recognize weights that count all batches so far, where a call is about the current batch."""

from __future__ import annotations


class Weights:
    """The weights of one rank's calls in a pass over a loader, in order.

    Args:
        number: of the first call.
    """

    def __init__(self, number: float) -> None:
        self._first = self._last = number
        self._least = float("inf")
        self._num_calls = 1

    def add(self, number: float) -> None:
        """Add the weight of the next call."""
        self._least = min(self._least, number - self._last)
        self._last = number
        self._num_calls += 1

    def are_totals(self, size: int) -> bool:
        """Return whether each weight is the one before and that of a batch.

        Args:
            size: samples of the last batch. Of two weights alone the second one must be the sum to the sample.
        """
        if self._num_calls == 2:
            return self._least == size
        # Numbers of tokens vary; those of single batches do not grow by a quarter of the first one in every call.
        return self._num_calls > 2 and self._least >= max(self._first / 4, 1e-9)
