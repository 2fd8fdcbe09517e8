"""Names of plugframe's own packages, the built-in plugins included."""

from __future__ import annotations

import functools

from plugframe.core.registry.entry_points import OWN_DISTRIBUTION, published


@functools.cache
def own_packages() -> frozenset[str]:
    """Return the top-level packages of plugframe's distribution, from its entry points: ``{"plugframe", …}``."""
    own = (entry.value.partition(":")[0] for entry in published().entries if entry.builtin)
    return frozenset({OWN_DISTRIBUTION, *(module.partition(".")[0] for module in own)})
