"""A dict with attributes, and a number of workers."""

from __future__ import annotations

import os
from typing import Any

from plugframe.errors import SettingError, closest


class AttributeDict(dict[str, Any]):
    """A dict whose keys are attributes too: ``state.step += 1``. It is a state that `Lite.save` and `load` take."""

    def __getattr__(self, key: str) -> Any:
        try:
            return self[key]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no key {key!r}.{closest(key, map(str, self))}") from None

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __delattr__(self, key: str) -> None:
        try:
            del self[key]
        except KeyError:
            raise AttributeError(f"{type(self).__name__} has no key {key!r}.{closest(key, map(str, self))}") from None

    def __repr__(self) -> str:
        width = max((len(str(key)) for key in self), default=0)
        return "\n".join(f"{str(key) + ':':{width + 1}} {value!r}" for key, value in self.items())


def suggested_max_num_workers(local_world_size: int) -> int:
    """Return the number of loader workers for one rank: an equal share of the CPU cores of its node, at least 1.

    Raises:
        SettingError: for less than one rank.
    """
    if local_world_size < 1:
        raise SettingError(
            f"suggested_max_num_workers() takes the ranks of a node, at least 1, got {local_world_size}."
        )
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # One core is the rank's own.
    return max(1, available // local_world_size - 1)
