"""Which packages are plugframe's own, the built-in plugins included."""

from __future__ import annotations

import functools
from importlib import metadata

_DISTRIBUTION = __name__.partition(".")[0]


@functools.cache
def own_packages() -> frozenset[str]:
    """Return the top-level packages of plugframe's own distribution, by its entry points: ``{"plugframe", …}``."""
    try:
        points = metadata.distribution(_DISTRIBUTION).entry_points
    except metadata.PackageNotFoundError:  # run from a folder that is not installed: nothing publishes the built-ins
        return frozenset({_DISTRIBUTION})
    return frozenset({_DISTRIBUTION, *(point.value.partition(":")[0].partition(".")[0] for point in points)})
