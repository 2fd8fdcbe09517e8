"""Stochastic weight averaging, sharded where the model is."""

from __future__ import annotations

from plugframe_builtins._shared.weight_average import WeightAverage
from plugframe_builtins.swa import plugin


class SWA(WeightAverage):
    """Keep the mean of the weights of every module that trains, after `start` steps, of each `every` steps.

    Running statistics of batch norms are averaged like weights: within ``averaged(model)``, a pass over the training
    data with ``torch.optim.swa_utils.update_bn`` makes them exact.

    Args:
        start: optimizer steps before the first that is averaged.
        every: optimizer steps per update, such as those of an epoch.
    """

    def __init__(self, *, start: int = 0, every: int = 1) -> None:
        plugin.validate(self, start=start, every=every)
        super().__init__(name="swa", every=every, start=start)

    def new_weight(self, num_updates: int) -> float:
        return 1 / num_updates
