"""Call ``set_epoch`` of samplers and datasets, unless the user does."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from plugframe.utils.swap import KEY, State, adopt, plain_class, release, state_of


class EpochState(State):
    """State of an adopted sampler or dataset.

    Attributes:
        by_user: whether the user ever called its ``set_epoch``.
        num_loaders: number of loaders that set its epoch.
    """

    def __init__(self) -> None:
        self.by_user = False
        self.num_loaders = 0


class EpochSetter:
    """Sets the epoch of a sampler or dataset, unless the user does."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self._epoch_set = getattr(target, "epoch", None)
        if state_of(target) is None:
            try:
                adopt(target, EpochState(), {"set_epoch": _set_epoch})
            except (TypeError, AttributeError):
                return  # its class cannot be swapped: calls by the user are detected by a changed `epoch`
        state = state_of(target)
        if isinstance(state, EpochState):
            state.num_loaders += 1

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch, unless the user ever did."""
        state = state_of(self.target)
        if getattr(state, "by_user", False) or getattr(self.target, "epoch", None) != self._epoch_set:
            return
        plain_class(self.target).set_epoch(self.target, epoch)
        self._epoch_set = getattr(self.target, "epoch", None)

    def release(self) -> None:
        """Restore the class of the sampler or dataset, if no other loader sets its epoch."""
        state = state_of(self.target)
        if isinstance(state, EpochState):
            state.num_loaders -= 1
            if state.num_loaders == 0:
                release(self.target)


def epoch_setters(candidates: Iterable[Any]) -> list[EpochSetter]:
    """Return a setter for each candidate with ``set_epoch``."""
    found: dict[int, Any] = {id(c): c for c in candidates if callable(getattr(type(c), "set_epoch", None))}
    return [EpochSetter(target) for target in found.values()]


def _set_epoch(self: Any, *args: Any, **kwargs: Any) -> Any:
    state = self.__dict__.get(KEY)
    if state is not None:
        state.by_user = True
    return plain_class(self).set_epoch(self, *args, **kwargs)
