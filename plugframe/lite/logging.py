"""Metrics, hyperparameters and artifacts for loggers."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plugframe.errors import SettingError
from plugframe.hooks.logger import artifact_kind
from plugframe.hooks.markers import marks_of
from plugframe.lite.artifacts import as_artifact, as_name
from plugframe.lite.hyperparams import flattened
from plugframe.utils.logging import warn_caller

if TYPE_CHECKING:
    from plugframe.hooks import LoggerSpec
    from plugframe.lite.lite import Lite


def log_dict(lite: Lite, metrics: Mapping[str, Any], step: int | None) -> None:
    """Hand metrics to extensions and callbacks, and on global rank 0 to every logger."""
    on_log = lite._hooks.on_log
    if on_log is not None:
        lite._started("log")
    elif not _records(lite, "log"):
        return
    number = _step("log", step)
    values = {k: _number(k, v) for k, v in metrics.items()}
    if on_log is not None:
        on_log(metrics=values, step=number)
    if lite.is_global_zero and lite.loggers:
        with _uninterrupted(lite):
            lite._hooks.logger_log(metrics=values, step=number)


def log_hyperparams(lite: Lite, params: Any) -> None:
    """Hand hyperparameters to every logger, flat and as JSON values; see `Lite.log_hyperparams`."""
    if _records(lite, "log_hyperparams"):
        flat = flattened(params)
        _warn_of_old(lite, "logger_log_hyperparams", "hyperparameters")
        if lite._hooks.logger_log_hyperparams is not None:
            with _uninterrupted(lite):
                lite._hooks.logger_log_hyperparams(params=flat)


def log_artifact(lite: Lite, name: str, value: Any, step: int | None) -> None:
    """Hand an artifact to every logger, in the form of its kind; see `Lite.log_artifact`."""
    if _records(lite, "log_artifact"):
        artifact, number = as_artifact(as_name(name), value), _step("log_artifact", step)
        _warn_of_old(lite, "logger_log_artifact", f"{artifact_kind(artifact)}s")
        if lite._hooks.logger_log_artifact is not None:
            with _uninterrupted(lite):
                lite._hooks.logger_log_artifact(name=name, value=artifact, step=number)


def first_logger(lite: Lite) -> LoggerSpec:
    """Return the first logger plugin in use.

    Raises:
        SettingError: if there is none.
    """
    if not lite.loggers:
        raise SettingError(_no_logger(lite))
    return lite.loggers[0]


def _records(lite: Lite, call: str) -> bool:
    """Return whether this rank records; warn if there is nothing to record in."""
    lite._started(call)
    if lite.is_global_zero and not lite.loggers:
        warn_caller(f"{call}() has no effect. {_no_logger(lite)}")
    return lite.is_global_zero and bool(lite.loggers)


def _uninterrupted(lite: Lite) -> AbstractContextManager[None]:
    return lite._termination.blocked() if lite._termination is not None else nullcontext()


def _warn_of_old(lite: Lite, hook: str, what: str) -> None:
    """Warn once of each logger that does not have a hook: one without plugframe's base class, of an older contract."""
    for choice, logger in zip(lite.plan.loggers, lite._session.loggers, strict=True):
        warned = (id(logger), what)
        if marks_of(logger, hook) is None and warned not in lite._not_stored:
            lite._not_stored.add(warned)
            origin = choice.entry.origin if choice.entry is not None else type(logger).__name__
            warn_caller(f"{origin} does not store {what}: it has no {hook}. They are not recorded there.")


def _no_logger(lite: Lite) -> str:
    first, *others = lite._registry.names("logger") or ["name"]
    or_others = f", or {', '.join(others)}" if others else ""
    return f"There is no logger: pass one, as in Lite(loggers={first!r}){or_others}."


def _step(call: str, step: Any) -> int | None:
    if step is None:
        return None
    try:
        # A float, or a tensor or an array of one number.
        return int(step) if int(step) == float(step) else operator.index(step)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise SettingError(f"{call}(step={step!r}): a step is an integer, or None.") from None


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise SettingError(f"log({name!r}): a metric is one number, got a tensor of shape {tuple(value.shape)}.")
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):  # the last of a complex tensor
        raise SettingError(f"log({name!r}): a metric is one number, got {value!r}.") from None
