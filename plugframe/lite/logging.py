"""Telling: callbacks, metrics, seeds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from plugframe.data import seed as seeds
from plugframe.errors import SettingError
from plugframe.lite.core import Core
from plugframe.utils.logging import warn_caller


class _Seeding:
    """``seed_everything`` of the class and of an object, which knows its device."""

    def __get__(self, lite: Core | None, owner: type) -> Callable[..., int]:
        def seed_everything(
            seed: int | str | None = None,
            workers: bool = False,
            verbose: bool = True,
            *,
            per_rank: bool | None = None,
        ) -> int:
            """Seed every generator, on every device; see `plugframe.seed_everything`."""
            if lite is None:
                return seeds.seed_everything(seed, workers, verbose, per_rank=per_rank)
            number, drawn = seeds.resolve_seed(seed)
            if drawn and lite.world_size > 1 and lite._alone():
                lite._started("seed_everything")
                number = int(lite._hooks.collective_broadcast_object(obj=number, src=0, group=None))
            device = lite._hooks.accelerator_seed
            seeds.seed_process(number, drawn=drawn, per_rank=per_rank, device=lambda seed: device(seed=seed))
            return number

        return seed_everything


class Telling(Core):
    """What goes to callbacks and loggers."""

    def call(self, hook_name: str, *args: Any, **kwargs: Any) -> None:
        """Call the method `hook_name` of every callback that has it, in the order they were passed.

        Raises:
            SettingError: if a callback has an attribute of that name that cannot be called.
        """
        for callback in self._callbacks:
            method = getattr(callback, hook_name, None)
            if method is None:
                continue
            if not callable(method):
                raise SettingError(f"{type(callback).__name__}.{hook_name} is no method: call() cannot call it.")
            method(*args, **kwargs)

    def log(self, name: str, value: Any, step: int | None = None) -> None:
        """Hand one metric to every logger."""
        self.log_dict({name: value}, step=step)

    def log_dict(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Hand metrics (numbers, or tensors of one element) to every logger, on global rank 0."""
        self._started("log")
        if not self.is_global_zero:
            return
        if self.loggers:
            self._hooks.logger_log(metrics={k: _number(k, v) for k, v in metrics.items()}, step=step)
        else:
            warn_caller(f"log() has no effect. {self._no_logger()}")

    seed_everything = _Seeding()


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise SettingError(f"log({name!r}): a metric is one number, got a tensor of shape {tuple(value.shape)}.")
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(f"log({name!r}): a metric is one number, got {value!r}.") from None
