"""Metrics for loggers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor

from plugframe.errors import SettingError
from plugframe.utils.logging import warn_caller

if TYPE_CHECKING:
    from plugframe.hooks import LoggerSpec
    from plugframe.lite.lite import Lite


def log_dict(lite: Lite, metrics: Mapping[str, Any], step: int | None) -> None:
    """Hand metrics to every logger, on global rank 0."""
    lite._started("log")
    if not lite.is_global_zero:
        return
    if lite.loggers:
        lite._hooks.logger_log(metrics={k: _number(k, v) for k, v in metrics.items()}, step=step)
    else:
        warn_caller(f"log() has no effect. {_no_logger(lite)}")


def first_logger(lite: Lite) -> LoggerSpec:
    """Return the first logger plugin in use.

    Raises:
        SettingError: if there is none.
    """
    if not lite.loggers:
        raise SettingError(_no_logger(lite))
    return lite.loggers[0]


def _no_logger(lite: Lite) -> str:
    first, *others = lite._registry.names("logger") or ["name"]
    or_others = f", or {', '.join(others)}" if others else ""
    return f"There is no logger: pass one, as in Lite(loggers={first!r}){or_others}."


def _number(name: str, value: Any) -> float:
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise SettingError(f"log({name!r}): a metric is one number, got a tensor of shape {tuple(value.shape)}.")
        value = value.detach()
    try:
        return float(value)
    except (TypeError, ValueError):
        raise SettingError(f"log({name!r}): a metric is one number, got {value!r}.") from None
