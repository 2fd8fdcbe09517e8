"""The results of the last stage, on every rank."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plugframe.base import map_tensors
from plugframe.errors import UnsupportedError
from plugframe_builtins.pipeline.axis import Axis
from plugframe_builtins.pipeline.micro_batches import merged, plain_leaves, refilled
from plugframe_builtins.pipeline.stand_in import tensors_of


class Outputs:
    """Send results from the rank of the last stage to all.

    Args:
        axis: the ranks of the pipeline.
        last: position of the rank of the last stage.
    """

    def __init__(self, axis: Axis, last: int) -> None:
        self._axis = axis
        self._last = last

    def share(self, expected: Any, results: Sequence[Any]) -> tuple[Any, list[Tensor]]:
        """Return the structure of the result, and its tensors for the whole batch; every rank must call it.

        Args:
            expected: the result with tensors on the meta device; values beside them may be others.
            results: of the micro-batches, on the rank of the last stage.
        """
        return self._structure(expected, results), self.tensors(expected, merged(results) if results else [])

    def tensors(self, expected: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the last stage's tensors; every rank must call it."""
        found = []
        for number, meta in enumerate(tensors_of(expected)):
            if self._axis.rank == self._last:
                sent = tensors[number].detach()
            else:
                sent = torch.zeros(meta.shape, dtype=meta.dtype, device=self._axis.device)
            found.append(self._axis.broadcast(sent, self._last) if sent.numel() else sent)
        return found

    def value(self, expected: Any, tensor: Tensor | None) -> Any:
        """Return the last stage's single tensor on all ranks."""
        return refilled(expected, self.tensors(expected, [] if tensor is None else [tensor]))

    def _structure(self, expected: Any, results: Sequence[Any]) -> Any:
        """Return the result's structure with the values beside tensors, which may be computed from the batch."""
        if all(isinstance(leaf, (str, type(None))) for leaf in plain_leaves(expected)):
            return expected
        found: Any = None
        if results:
            values = [plain_leaves(result) for result in results]
            odd = next((other for other in values if other != values[0]), None)
            found = map_tensors(_on_meta, results[0]) if odd is None else f"{values[0]!r} and {odd!r}"
        found = self._axis.broadcast_object(found, self._last)
        if found is None:  # of a simulated rank
            return expected
        if isinstance(found, str):
            raise UnsupportedError(
                f"The model returns, beside tensors, {found} for two micro-batches, which strategy 'pipeline' cannot "
                "put together: return tensors with one row per sample, or use micro_batches=1."
            )
        return found


def _on_meta(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta", requires_grad=tensor.requires_grad)
