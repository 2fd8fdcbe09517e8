"""Standard modules with backports for older Pythons, imported on first access; and what can be imported at all."""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import os
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import importlib.metadata as metadata

    tomllib: Any  # missing for a type checker that targets Python 3.10

__all__ = ["importable", "installed", "is_submodule", "metadata", "tomllib"]


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


def is_submodule(package: str, name: str) -> bool:
    """Return whether an imported package has a module of that name, by searching its folders only."""
    folders = getattr(sys.modules.get(package), "__path__", ())
    path, suffixes = name.replace(".", os.sep), ("", *importlib.machinery.all_suffixes())
    return any(os.path.exists(os.path.join(folder, path + suffix)) for folder in folders for suffix in suffixes)


def importable(module: str) -> bool:
    """Return whether a module can be found, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except Exception:  # noqa: BLE001 - to find "a.b", a is imported, which may raise anything
        return False


def installed(distribution: str) -> bool:
    """Return whether a distribution is installed."""
    try:
        _metadata().version(distribution)
    except _metadata().PackageNotFoundError:
        return False
    return True


def _metadata() -> Any:
    return __getattr__("metadata")
