"""One line on the terminal, from one rank."""

from __future__ import annotations

import logging
import sys


def tell(message: str) -> None:
    """Log `message`, or print it to stderr in a program that has not set up logging."""
    logger = logging.getLogger("plugframe")
    if logger.hasHandlers():
        logger.info(message)
    else:
        print(f"plugframe: {message}", file=sys.stderr)
