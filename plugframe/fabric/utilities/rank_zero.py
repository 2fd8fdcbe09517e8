"""Messages of rank 0.

`rank_zero_info` and the others may be called before a `Lite` is made: the rank is that of the process group, or before
there is one, that of the variable ``RANK``.
"""

from __future__ import annotations

import importlib
import logging
import os
import warnings
from typing import Any

import torch.distributed as dist

_LOGGER = logging.getLogger(__name__)


def rank_zero_info(message: object, *args: object, stacklevel: int = 1) -> None:
    """Log a message at level INFO on global rank 0."""
    if _is_rank_zero():
        _LOGGER.info(message, *args, stacklevel=stacklevel + 1)


def rank_zero_debug(message: object, *args: object, stacklevel: int = 1) -> None:
    """Log a message at level DEBUG on global rank 0."""
    if _is_rank_zero():
        _LOGGER.debug(message, *args, stacklevel=stacklevel + 1)


def rank_zero_warn(message: Warning | str, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn on global rank 0, at the line of the call."""
    if _is_rank_zero():
        warnings.warn(message, category, stacklevel=stacklevel + 1)


def rank_zero_deprecation(message: Warning | str, stacklevel: int = 1) -> None:
    """Warn of a deprecation on global rank 0, at the line of the call."""
    rank_zero_warn(message, DeprecationWarning, stacklevel + 1)


def _is_rank_zero() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def __getattr__(name: str) -> Any:
    if name != "rank_zero_only":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("plugframe"), name)
