"""Silence torch's elastic agent, whose failures the launcher reports itself."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def silence_torch() -> Iterator[contextlib.ExitStack]:
    """Silence torch's failure messages and warnings, which `report` covers, until the stack it gives is closed."""
    names = ("torch.distributed.elastic", "torch.multiprocessing", "torch.numa")
    handler = logging.NullHandler()
    with contextlib.ExitStack() as stack:
        for logger in map(logging.getLogger, names):
            stack.callback(setattr, logger, "propagate", logger.propagate)
            stack.callback(logger.removeHandler, handler)
            logger.addHandler(handler)
            logger.propagate = False
        stack.enter_context(warnings.catch_warnings())
        # Python warns when it forks beside the store's thread, which ranks do not use.
        warnings.filterwarnings("ignore", message=".*multi-threaded, use of fork", category=DeprecationWarning)
        # Torch leaves closing the log files of ended ranks to the garbage collector.
        warnings.filterwarnings("ignore", message=r"unclosed file .*\.log'", category=ResourceWarning)
        yield stack
