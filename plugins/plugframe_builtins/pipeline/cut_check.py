"""Find out whether a batch may be cut: whether its result follows from those of the micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from plugframe.errors import UnsupportedError

_REMEDY = "use micro_batches=1"


class CutCheck:
    """Compare the result of the whole batch with those of the micro-batches: at the first call, then ever more rarely.

    A loss that is a mean or a sum over samples follows from the micro-batches. One that weighs samples by the batch (a
    mean over tokens that are not padding, a contrastive loss) does not, and would train with wrong gradients. Outputs
    follow if each depends on its own sample only.

    Args:
        what: the class of the model, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._calls = {True: 0, False: 0}
        #: What the losses so far may be.
        self._kinds = {"mean", "sum"}

    def due(self, count: int, *, is_loss: bool) -> bool:
        """Return whether to compare in this call; called once for each call."""
        if count == 1:
            return False
        self._calls[is_loss] += 1
        return not self._calls[is_loss] & (self._calls[is_loss] - 1)

    def weight(self, count: int) -> float:
        """Return the weight of a micro-batch's loss, of `count`."""
        return 1.0 / count if "mean" in self._kinds else 1.0

    def compare_losses(self, whole: float, parts: Sequence[float], *, low: bool) -> None:
        """Compare; every rank calls it with the same values.

        Args:
            low: whether the model computes in a precision of about three digits.

        Raises:
            UnsupportedError: if the loss is neither the mean nor the sum.
        """
        if not math.isfinite(whole):
            return
        tolerance = (2e-2 if low else 1e-4) * max(abs(whole), max(map(abs, parts)), 1e-6)
        total = sum(parts)
        mean = total / len(parts)
        found = {kind for kind, value in (("mean", mean), ("sum", total)) if abs(whole - value) <= tolerance}
        if not found & self._kinds:
            raise UnsupportedError(
                f"The loss that this {self._what} returns for a batch is {whole:.6g}, and for its {len(parts)} "
                f"micro-batches {mean:.6g} on average and {total:.6g} in sum: it is no mean or sum over the samples, "
                "so strategy 'pipeline' cannot compute it from micro-batches. Have the model return its outputs and "
                f"compute the loss in the loop, or {_REMEDY}."
            )
        self._kinds &= found

    def refuse(self, count: int) -> None:
        """Raise since outputs differ; every rank calls it.

        Raises:
            UnsupportedError: always.
        """
        raise UnsupportedError(
            f"The outputs of this {self._what} for a batch differ from those for its {count} micro-batches: some "
            "depend on other samples (a norm over the batch, a first dimension that is not that of the samples), so "
            f"strategy 'pipeline' cannot compute them from micro-batches: {_REMEDY}."
        )


def same_outputs(whole: Sequence[Tensor], parts: Sequence[Tensor], *, low: bool) -> bool:
    """Return whether outputs are equal but for rounding; whole numbers may follow from rounded ones, and may differ."""
    tolerance = 5e-2 if low else 1e-3
    for first, second in zip(whole, parts, strict=True):
        if not first.numel() or not (first.is_floating_point() or first.is_complex()):
            continue
        scale = float(first.abs().nan_to_num(0.0, 0.0, 0.0).amax())
        same = torch.isclose(first, second, rtol=tolerance, atol=tolerance * max(scale, 1e-6), equal_nan=True)
        if not bool(same.all()):
            return False
    return True
