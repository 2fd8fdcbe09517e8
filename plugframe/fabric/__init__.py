"""Lightning Fabric's names: ``lightning.fabric`` becomes ``plugframe.fabric`` in the imports of a script.

See docs/migration.md for the differences.
"""

from __future__ import annotations

from plugframe.adopt import state_of
from plugframe.data.seed import seed_everything
from plugframe.lite import Lite

__all__ = ["Fabric", "is_wrapped", "seed_everything"]

#: The same class: there is one API, with Fabric's methods and arguments.
Fabric = Lite


def is_wrapped(obj: object) -> bool:
    """Return whether a module, an optimizer or a loader is set up, until tear-down. It is never wrapped."""
    return state_of(obj) is not None
