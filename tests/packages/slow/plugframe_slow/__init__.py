"""Descriptors; importing this, and importing what they describe, each adds a line to ``$SLOW_TRACE``."""

import os

from plugframe import Plugin


def trace(line: str) -> None:
    """Write down that something was imported."""
    path = os.environ.get("SLOW_TRACE")
    if path:
        with open(path, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")


trace("descriptors")
strategy = Plugin(factory="plugframe_slow.heavy:Slow", summary="Heavy to import.", priority=5)
logger = Plugin(factory="plugframe_slow.heavy:SlowLogger", summary="Heavy to import.")
