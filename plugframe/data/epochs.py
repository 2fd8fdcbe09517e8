"""Telling samplers and datasets the epoch, unless the user does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from plugframe.utils.swap import KEY, State, adopt, plain_class, release, state_of


class EpochState(State):
    """What an adopted sampler or dataset knows.

    Attributes:
        by_user: whether the user ever called its ``set_epoch``.
        loaders: how many loaders tell it the epoch.
    """

    def __init__(self) -> None:
        self.by_user = False
        self.loaders = 0


class EpochOf:
    """Tells a sampler or dataset the epoch, unless the user does."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._seen = getattr(target, "epoch", None)
        if state_of(target) is None:
            try:
                adopt(target, EpochState(), {"set_epoch": _set_epoch})
            except (TypeError, AttributeError):
                return  # its class cannot be swapped: whether the user tells it the epoch is read from the epoch
        state = state_of(target)
        if isinstance(state, EpochState):
            state.loaders += 1

    def tell(self, epoch: int) -> None:
        """Set the epoch, unless the user ever did."""
        state = state_of(self.target)
        if getattr(state, "by_user", False) or getattr(self.target, "epoch", None) != self._seen:
            return
        plain_class(self.target).set_epoch(self.target, epoch)
        self._seen = getattr(self.target, "epoch", None)

    def release(self) -> None:
        """Give the sampler or dataset back as it was, if no other loader tells it the epoch."""
        state = state_of(self.target)
        if isinstance(state, EpochState):
            state.loaders -= 1
            if state.loaders == 0:
                release(self.target)


def epoch_targets(candidates: Iterable[Any]) -> list[EpochOf]:
    """Return what is to be told the epoch."""
    found: dict[int, Any] = {id(c): c for c in candidates if callable(getattr(type(c), "set_epoch", None))}
    return [EpochOf(target) for target in found.values()]


def _set_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
    state = self.__dict__.get(KEY)
    if state is not None:
        state.by_user = True
    return plain_class(self).set_epoch(self, *args, **kwargs)
