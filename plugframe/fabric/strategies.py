"""Fabric's strategy classes, by the names and arguments they have there.

Each makes the strategy plugin that does the same; the plugin's package publishes it in the entry-point group
``plugframe_fabric``.
"""

from __future__ import annotations

from typing import Any

from plugframe._compat import metadata
from plugframe.errors import closest

GROUP = "plugframe_fabric"


def __getattr__(name: str) -> Any:
    points = {point.name: point for point in metadata.entry_points(group=GROUP)}
    if name not in points:
        hint = "" if name.startswith("_") else closest(name, points)
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}.{hint}")
    value = globals()[name] = points[name].load()
    return value


def __dir__() -> list[str]:
    return sorted(point.name for point in metadata.entry_points(group=GROUP))
