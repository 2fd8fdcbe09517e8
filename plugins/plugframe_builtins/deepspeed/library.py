"""DeepSpeed's modules, which have no types and need not be installed to check those of this package."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str = "") -> Any:
    """Return ``deepspeed``, or the module of that name in it."""
    return importlib.import_module(f"deepspeed.{name}" if name else "deepspeed")
