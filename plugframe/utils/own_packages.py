"""Names of plugframe's own packages, the built-in plugins included."""

from __future__ import annotations

import functools
from importlib import metadata

_DISTRIBUTION = __name__.partition(".")[0]


@functools.cache
def own_packages() -> frozenset[str]:
    """Return the top-level packages of plugframe's distribution, from its entry points: ``{"plugframe", …}``."""
    try:
        points = metadata.distribution(_DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:  # not installed: no entry points
        return frozenset({_DISTRIBUTION})
    return frozenset({_DISTRIBUTION, *(point.value.partition(":")[0].partition(".")[0] for point in points)})
