"""The `Lite` class, and the function modules that implement its methods."""

from plugframe.lite.lite import Lite

__all__ = ["Lite"]
