"""Logger objects of Fabric and Lightning, by their methods: no import of either."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from plugframe.base import Logger, warn_caller
from plugframe.errors import SettingError
from plugframe.hooks import KINDS, Context, HyperParameter, hookimpl

#: What such an object has; one of them is enough to recognize an object that lacks `log_metrics`.
_METHODS = ("log_metrics", "log_hyperparams", "finalize", "save")


def adapt(logger: Any) -> Any:
    """Return a plugin for a logger object of Fabric or Lightning; anything else as it is.

    Raises:
        SettingError: if a method that it must have is missing, or takes other arguments.
    """
    if isinstance(logger, (str, type)) or KINDS["logger"].provided_by(logger):
        return logger
    found = [name for name in _METHODS if callable(getattr(logger, name, None))]
    if not found:
        return logger
    cls = type(logger)
    if "log_metrics" not in found:
        raise SettingError(
            f"loggers={cls.__name__}: it has {', '.join(f'{name}()' for name in found)}, and no log_metrics(metrics, "
            "step): add it, or pass a logger by name."
        )
    try:
        inspect.signature(logger.log_metrics).bind(metrics={}, step=0)
    except TypeError as error:
        raise SettingError(
            f"loggers={cls.__name__}: its log_metrics() is called as log_metrics(metrics={{…}}, step=0): {error}."
        ) from None
    except ValueError:
        pass  # a method without a signature, of C
    # A class of its own, so that the plan and messages have the name of the user's.
    named = {"__module__": cls.__module__, "__qualname__": cls.__qualname__}
    made: Logger = type(cls.__name__, (AdaptedLogger,), named)(logger)
    return made


def adapted(logger: Any) -> Any:
    """Return the user's own object of a logger in use."""
    return logger.own if isinstance(logger, AdaptedLogger) else logger


class AdaptedLogger(Logger):
    """Record with an object that has `log_metrics`, and `log_hyperparams`, `save` and `finalize` if it likes.

    It gets a step with every call, and flat hyperparameters; on rank 0 only. Its runs have no id here, and a job that
    loads a checkpoint records a new one, unless the object continues it by itself.

    Attributes:
        own: the user's object.
    """

    def __init__(self, own: Any) -> None:
        self.own = own
        self._writes = False

    @hookimpl
    def logger_setup(self, context: Context) -> None:
        self.calls, self._writes = 0, context.world.global_rank == 0

    @hookimpl
    def logger_log(self, metrics: Mapping[str, float], step: int | None) -> None:
        self.own.log_metrics(metrics=dict(metrics), step=self.next_step(step))

    @hookimpl
    def logger_log_hyperparams(self, params: Mapping[str, HyperParameter]) -> None:
        if callable(getattr(self.own, "log_hyperparams", None)):
            self.own.log_hyperparams(dict(params))
        else:
            self.warn_not_stored("hyperparameters", next(iter(params), ""))

    @hookimpl
    def logger_state(self) -> dict[str, Any]:
        """Return the number of calls."""
        return {"calls": self.calls}

    @hookimpl
    def logger_teardown(self, error: BaseException | None = None) -> None:
        """Save and finalize; an object without `finalize` does not learn that a run failed, which is told."""
        if not self._writes:
            return
        self._writes = False
        for name, arguments in (("save", ()), ("finalize", ("failed" if error is not None else "success",))):
            method = getattr(self.own, name, None)
            if callable(method):
                method(*arguments)
            elif name == "finalize" and error is not None:
                warn_caller(f"{type(self.own).__name__} does not record that the run failed: it has no finalize().")
