"""The mean of the step results over a batch's parts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plugframe.errors import SettingError


class Mean:
    """Sum weighted tensors or numbers, or dicts of them; the weights sum to 1."""

    def __init__(self) -> None:
        self._total: Any = None

    def add(self, value: Any, weight: float) -> None:
        """Add the result of one part."""
        weighed = _weighed(value, weight)
        if self._total is None:
            self._total = weighed
        elif isinstance(weighed, dict):
            self._total = {key: self._total[key] + each for key, each in weighed.items()}
        elif weighed is not None:
            self._total = self._total + weighed

    def value(self) -> Any:
        """Return the mean, None without results."""
        return self._total


def _weighed(value: Any, weight: float) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {key: _weighed(each, weight) for key, each in value.items()}
    if isinstance(value, Tensor):
        # Detached: a graph would keep the memory of every part.
        return value.detach() if weight == 1.0 else value.detach() * weight
    if isinstance(value, (int, float)):
        return value if weight == 1.0 else value * weight
    raise SettingError(
        "A step that oom-retry runs returns a tensor or a number, a dict of those, or None; got "
        f"{type(value).__name__}."
    )
