"""Untyped access to DeepSpeed's modules, so that type checks do not need it installed."""

from __future__ import annotations

import importlib
from typing import Any


def library(name: str = "") -> Any:
    """Return ``deepspeed``, or one of its modules."""
    return importlib.import_module(f"deepspeed.{name}" if name else "deepspeed")
