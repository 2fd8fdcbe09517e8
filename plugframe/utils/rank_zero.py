"""Actions, messages and warnings of global rank 0 alone."""

from __future__ import annotations

import functools
import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, ParamSpec, TypeVar, overload

P = ParamSpec("P")
T = TypeVar("T")

#: Variables with the global rank of a process, of torchrun and plugframe, SLURM, LSF and MPI.
_RANK_VARIABLES = ("RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
#: Name of the function under `rank_zero_only` that is running; None outside of one.
_running: ContextVar[str | None] = ContextVar("rank_zero_only", default=None)


def running_on_rank_zero() -> str | None:
    """Return the name of the function under `rank_zero_only` that is running; None outside of one."""
    return _running.get()


class RankZeroOnly:
    """Decorate a function that only global rank 0 runs; other ranks return None, or `default`.

    ::

        @rank_zero_only
        def report(metrics): ...

    What every rank must call (`Lite.save`, `Lite.all_reduce`, …) raises inside of it, if there are several ranks.

    Attributes:
        rank: the global rank of this process; it may be set, as in Lightning, for processes that nothing has ranked.
    """

    _rank: int | None = None

    @property
    def rank(self) -> int:
        """The global rank of this process, 0 for a single one."""
        distributed: Any = getattr(sys.modules.get("torch"), "distributed", None)
        if distributed is not None and distributed.is_available() and distributed.is_initialized():
            return int(distributed.get_rank())
        if self._rank is not None:
            return self._rank
        found = (os.environ.get(name, "") for name in _RANK_VARIABLES)
        return next((int(text) for text in found if text.isdigit()), 0)

    @rank.setter
    def rank(self, value: int) -> None:
        self._rank = value

    @overload
    def __call__(self, function: Callable[P, T], default: None = None) -> Callable[P, T | None]: ...
    @overload
    def __call__(self, function: Callable[P, T], default: T) -> Callable[P, T]: ...
    @overload
    def __call__(
        self, function: None = None, default: object = None
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]: ...
    def __call__(self, function: Callable[..., Any] | None = None, default: Any = None) -> Any:
        """Return `function`, which returns `default` on other ranks."""
        if function is None:
            return functools.partial(self, default=default)

        @functools.wraps(function)
        def on_rank_zero(*args: Any, **kwargs: Any) -> Any:
            if self.rank:
                return default
            token = _running.set(getattr(function, "__qualname__", repr(function)))
            try:
                return function(*args, **kwargs)
            finally:
                _running.reset(token)

        return on_rank_zero


rank_zero_only = RankZeroOnly()


class RankZeroFilter(logging.Filter):
    """A filter for handlers: pass records of other ranks from `level` on only, and set ``record.rank``.

    ::

        logging.basicConfig(format="[rank %(rank)s] %(message)s")
        logging.getLogger().handlers[0].addFilter(RankZeroFilter())
    """

    def __init__(self, level: int = logging.WARNING) -> None:
        super().__init__()
        self.level = level

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the record is logged."""
        rank = vars(record)["rank"] = rank_zero_only.rank
        return not rank or record.levelno >= self.level


def rank_zero_debug(message: object, *args: object, **kwargs: Any) -> None:
    """Log a message of level debug with the caller's logger, on rank 0."""
    _log(logging.DEBUG, message, args, kwargs)


def rank_zero_info(message: object, *args: object, **kwargs: Any) -> None:
    """Log a message of level info with the caller's logger, on rank 0; print it to stderr if logging is not set up."""
    _log(logging.INFO, message, args, kwargs)


def _log(level: int, message: object, args: tuple[object, ...], kwargs: dict[str, Any]) -> None:
    if rank_zero_only.rank:
        return
    logger = logging.getLogger(str(sys._getframe(2).f_globals.get("__name__", "plugframe")))
    if logger.hasHandlers():
        kwargs["stacklevel"] = kwargs.get("stacklevel", 1) + 2
        logger.log(level, message, *args, **kwargs)
    elif level >= logging.INFO:
        print(str(message) % args if args else message, file=sys.stderr)


@functools.cache
def _is_new(text: str, category: str) -> bool:
    return True


def rank_zero_warn(message: object, category: type[Warning] = UserWarning, stacklevel: int = 1) -> None:
    """Warn at the caller's line, on rank 0, and once for each message."""
    if rank_zero_only.rank:
        return
    before = _is_new.cache_info().misses
    _is_new(str(message), category.__name__)
    if _is_new.cache_info().misses > before:
        warnings.warn(str(message), category, stacklevel=stacklevel + 1)
