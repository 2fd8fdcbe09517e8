"""Pipelines whose stages communicate with each other in forwards, as divided experts do."""

from __future__ import annotations

from typing import Any

import torch

from plugframe.errors import UnsupportedError


class EqualCalls:
    """Compare the calls of all pipelines of the job: their stages run collectives in every micro-batch.

    Args:
        hooks: those of the job.
        paths: of the parts that communicate, on this rank.
    """

    def __init__(self, hooks: Any, paths: list[str]) -> None:
        self._hooks = hooks
        self.paths = paths

    def agree(self, known: bool, count: int) -> bool:
        """Return whether all ranks know what their stages send in a call. Every rank must call it.

        Raises:
            UnsupportedError: on all ranks, if the numbers of micro-batches differ.
        """
        mine = torch.tensor([int(known), count])
        rows = self._hooks.collective_all_gather(tensor=mine, group=None, sync_grads=False).tolist()
        counts = sorted({number for _, number in rows})
        if len(counts) > 1:
            raise UnsupportedError(
                f"The pipelines of this job cut their batches into {counts[0]} and {counts[-1]} micro-batches, and "
                f"their experts ({', '.join(self.paths) or 'of other stages'}) exchange tokens in each: use batches "
                "of one size (drop_last=True), which micro_batches= divides."
            )
        return all(knows for knows, _ in rows)
