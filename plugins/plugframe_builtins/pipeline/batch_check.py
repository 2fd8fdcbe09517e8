"""Check that all ranks of a pipeline call the model with the same batch."""

from __future__ import annotations

from typing import Any

import xxhash
from torch import Tensor

from plugframe.base import map_tensors
from plugframe.checkpoint import as_bytes
from plugframe.errors import OutOfSyncError
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.micro_batches import signature


class BatchCheck:
    """Compare the arguments of calls between ranks: those of the first, and then ever more rarely.

    The first stage would compute with its rank's samples, and the last one with its rank's targets.

    Args:
        axis: the ranks of the pipeline.
    """

    def __init__(self, axis: Axis) -> None:
        self._axis = axis
        self._calls = 0

    def compare(self, arguments: Any) -> None:
        """Compare the arguments of this call; every rank must call it.

        Raises:
            OutOfSyncError: on all ranks, if they differ.
        """
        self._calls += 1
        if self._calls & (self._calls - 1):
            return
        digest = xxhash.xxh3_64(repr(signature(arguments)).encode())

        def add(tensor: Tensor) -> Tensor:
            if not tensor.is_sparse:
                held = tensor.detach().cpu().contiguous()  # its bytes are valid while it lives
                digest.update(as_bytes(held))
            return tensor

        map_tensors(add, arguments)
        everyone = self._axis.gather_objects(digest.intdigest())
        odd = next((rank for rank, other in enumerate(everyone) if other != everyone[0]), None)
        if odd is not None:
            raise OutOfSyncError(
                f"Ranks {self._axis.ranks[0]} and {self._axis.ranks[odd]} call the model with different batches, and "
                "the ranks of a pipeline share one: take it from a loader of lite.setup_dataloaders(), do not divide "
                "it by rank, and draw random numbers for it after lite.seed_everything() on all ranks."
            )
