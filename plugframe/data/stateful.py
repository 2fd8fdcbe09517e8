"""Objects with a ``state_dict``."""

from __future__ import annotations

from typing import Any


def is_stateful(value: Any) -> bool:
    """Return whether a value has ``state_dict`` and ``load_state_dict``."""
    return callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None))
