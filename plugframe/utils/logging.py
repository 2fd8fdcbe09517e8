"""What is told on the terminal: one line, from one rank; and sizes for people."""

from __future__ import annotations

import logging
import sys
import warnings

from plugframe._printable import printable
from plugframe.errors import PlugframeWarning
from plugframe.utils.own_packages import own_packages

#: Packages of others whose frames lie between a line of the user's and the warning about it.
_BETWEEN = ("pluggy", "torch", "contextlib", "functools")


def tell(message: str, *, warn: bool = False) -> None:
    """Log `message`, at level warning if `warn`, or print it to stderr in a program that has not set up logging."""
    message = printable(message)
    logger = logging.getLogger("plugframe")
    if logger.hasHandlers():
        logger.log(logging.WARNING if warn else logging.INFO, message)
    else:
        print(f"plugframe: {message}", file=sys.stderr)


def warn_caller(message: str) -> None:
    """Warn at the line of the user's that led here, whatever lies between: hooks, and a scheduler's wrapper."""
    level, frame = 2, sys._getframe(1)
    between = own_packages().union(_BETWEEN)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).partition(".")[0] in between:
        level, frame = level + 1, frame.f_back
    warnings.warn(printable(message), PlugframeWarning, stacklevel=level)


def failing() -> bool:
    """Say whether this process ends by an error, which should be the last thing that is read."""
    return sys.exc_info()[0] is not None or getattr(sys, "last_value", None) is not None


def size_text(num_bytes: float) -> str:
    """Return a number of bytes for people: ``"512 B"``, ``"1.5 MB"``."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000 or unit == "GB":
            return f"{num_bytes:.4g} {unit}" if unit != "B" else f"{num_bytes:.0f} B"
        num_bytes /= 1000
    raise AssertionError
