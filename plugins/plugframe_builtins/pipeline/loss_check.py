"""Find out how the loss of a batch follows from those of its micro-batches."""

from __future__ import annotations

import math
from collections.abc import Sequence

from plugframe.errors import UnsupportedError


class LossCheck:
    """Compare the loss of the whole batch with those of the micro-batches: at the first call, then ever more rarely.

    A mean and a sum over samples follow from the micro-batches. A loss that weighs samples by the batch (a mean over
    tokens that are not padding, a contrastive loss) does not, and would train with wrong gradients.

    Args:
        what: the class of the model, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._calls = 0
        #: What the losses so far may be.
        self._kinds = {"mean", "sum"}

    def due(self, count: int) -> bool:
        """Return whether to compare in this call; called once for each call that returns a loss."""
        if count == 1:
            return False
        self._calls += 1
        return not self._calls & (self._calls - 1)

    def weight(self, count: int) -> float:
        """Return the weight of a micro-batch's loss, of `count`."""
        return 1.0 / count if "mean" in self._kinds else 1.0

    def compare(self, whole: float, parts: Sequence[float], *, low: bool) -> None:
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
                "compute the loss in the loop, or use micro_batches=1."
            )
        self._kinds &= found
