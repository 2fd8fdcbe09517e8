"""Log messages and warnings of the framework, and formatted sizes."""

from __future__ import annotations

import logging
import sys
import warnings

from plugframe.errors import PlugframeWarning, printable
from plugframe.utils.own_packages import own_packages

#: Third-party packages whose frames are skipped to find the user's line for a warning.
_SKIPPED_PACKAGES = ("pluggy", "torch", "contextlib", "functools")


def tell(message: str, *, warn: bool = False) -> None:
    """Log `message`, at level warning if `warn`, or print it to stderr in a program that has not set up logging."""
    message = printable(message)
    logger = logging.getLogger("plugframe")
    if logger.hasHandlers():
        logger.log(logging.WARNING if warn else logging.INFO, message)
    else:
        print(f"plugframe: {message}", file=sys.stderr)


def warn_caller(message: str, *, deprecated: bool = False) -> None:
    """Warn at the line of the user's code that led here, skipping frames of hooks and wrappers.

    Args:
        deprecated: whether the code uses a deprecated name, which Python shows in scripts and tests only.
    """
    level, frame = 2, sys._getframe(1)
    skipped = own_packages().union(_SKIPPED_PACKAGES)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in skipped:
        level, frame = level + 1, frame.f_back
    category = DeprecationWarning if deprecated else PlugframeWarning
    warnings.warn(printable(message), category, stacklevel=level)


def failing() -> bool:
    """Return whether this process is ending with an error, which should stay the last output."""
    return sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None


def size_text(num_bytes: float) -> str:
    """Format a number of bytes: ``"512 B"``, ``"1.5 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.4g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    raise AssertionError
