"""The base class of launchers."""

from __future__ import annotations

from plugframe.hooks import LauncherSpec


class Launcher(LauncherSpec):
    """Base class of launchers: implement `launcher_launch`, marked with ``@hookimpl``."""
