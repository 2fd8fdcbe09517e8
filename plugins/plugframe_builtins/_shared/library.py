"""Libraries of extras, imported when they are used."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any

from plugframe.errors import MissingDependencyError


def require(name: str, extra: str, user: str) -> None:
    """Verify that a library is installed, without importing it: on every rank, so that none fails alone.

    Raises:
        MissingDependencyError: if it is not.
    """
    if importlib.util.find_spec(name) is None:
        raise MissingDependencyError(f"{user} needs {name}: type \"pip install '{extra}'\".")


def library(name: str) -> Any:
    """Return a module as an untyped object, so that type checks do not need it installed."""
    return importlib.import_module(name)
