"""Standard modules with backports for older Pythons, imported on first access."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import importlib.metadata as metadata

    tomllib: Any  # missing for a type checker that targets Python 3.10

__all__ = ["metadata", "tomllib"]


def __getattr__(name: str) -> Any:
    # Lazy, because a listing needs only metadata, and both imports are a third of its time.
    new = sys.version_info >= (3, 11)
    modules = {
        "metadata": "importlib.metadata" if new else "importlib_metadata",
        "tomllib": "tomllib" if new else "tomli",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(modules[name])
