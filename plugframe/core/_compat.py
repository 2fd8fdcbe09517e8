"""The two standard modules that are too old on Python 3.10, imported when first asked for."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import importlib.metadata as metadata

    tomllib: Any  # a type checker set to 3.10 knows no such module

__all__ = ["metadata", "tomllib"]


def __getattr__(name: str) -> Any:
    # A listing needs the one and never the other; together they are a third of its time.
    new = sys.version_info >= (3, 11)
    modules = {
        "metadata": "importlib.metadata" if new else "importlib_metadata",
        "tomllib": "tomllib" if new else "tomli",
    }
    if name not in modules:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return importlib.import_module(modules[name])
