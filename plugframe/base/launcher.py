"""A base for launchers."""

from __future__ import annotations

from plugframe.hooks import LauncherSpec


class Launcher(LauncherSpec):
    """Subclass it, give `launcher_launch` and mark it with ``@hookimpl``."""
