"""The exponential moving average, sharded where the model is."""

from __future__ import annotations

from plugframe_builtins._shared.weight_average import WeightAverage
from plugframe_builtins.ema import plugin


class EMA(WeightAverage):
    """Keep an exponential moving average of every module that trains.

    Args:
        decay: weight of the old average in each update.
        every: optimizer steps per update.
        warm_up: use a smaller decay, ``(1 + n) / (10 + n)``, in the first updates.
    """

    def __init__(self, *, decay: float = 0.999, every: int = 1, warm_up: bool = True) -> None:
        plugin.validate(self, decay=decay, every=every, warm_up=warm_up)
        super().__init__(name="ema", every=every, start=0)
        self.decay, self.warm_up = decay, warm_up

    def new_weight(self, num_updates: int) -> float:
        warm = (1 + num_updates) / (10 + num_updates)
        return 1 - (min(self.decay, warm) if self.warm_up else self.decay)
