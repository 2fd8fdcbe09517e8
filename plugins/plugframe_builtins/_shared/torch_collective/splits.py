"""Numbers of rows that ranks exchange in an all-to-all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from plugframe.errors import CollectiveMismatchError


@dataclass(frozen=True, kw_only=True)
class Split:
    """The rows of one rank.

    Attributes:
        output: number of rows from each rank.
        input: number of rows for each rank.
    """

    output: list[int]
    input: list[int]

    @classmethod
    def even(cls, size: int) -> Split:
        """Return one row from and for each of `size` ranks."""
        return cls(output=[1] * size, input=[1] * size)

    @property
    def back(self) -> Split:
        """The split that returns the rows."""
        return Split(output=self.input, input=self.output)

    def as_bytes(self) -> Tensor:
        """Return the numbers as bytes, for `check_sizes`: dtype uint8, shape (16 * ranks,)."""
        return torch.tensor([*self.output, *self.input], dtype=torch.int64).view(torch.uint8)


def check_sizes(rows: Tensor, ranks: Sequence[int]) -> None:
    """Check that every rank expects what the others send.

    Args:
        rows: the bytes of every rank's `Split`, of shape (ranks, 16 * ranks).
        ranks: global ranks of the group.

    Raises:
        CollectiveMismatchError: on all ranks, with the first difference.
    """
    sizes = rows.cpu().view(torch.int64).view(len(ranks), 2, len(ranks))
    expected, sent = sizes[:, 0].t(), sizes[:, 1]  # (sender, receiver) each
    different = (expected != sent).nonzero().tolist()
    if different:
        i, j = different[0]
        raise CollectiveMismatchError(
            f"The ranks do not agree on all_to_all: rank {ranks[i]} sends {int(sent[i, j])} rows to rank {ranks[j]}, "
            f"whose output_sizes expect {int(expected[i, j])}. Exchange the input_sizes by an all_to_all without sizes "
            "first: the result is output_sizes."
        )
