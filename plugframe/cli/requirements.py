"""What a command needs besides plugframe's light dependencies."""

from __future__ import annotations

import importlib.util

from plugframe.errors import MissingDependencyError


def require_torch(command: str) -> None:
    """Check that PyTorch can be imported, without importing it: without it every plugin would be reported as broken.

    Raises:
        MissingDependencyError: if it is not installed.
    """
    if importlib.util.find_spec("torch") is None:
        raise MissingDependencyError(f"{command} needs PyTorch, which is not installed: pip install torch")
