"""The user's object, in parts by what they are for: it delegates, and decides nothing."""

from plugframe.lite.lite import Lite

__all__ = ["Lite"]
