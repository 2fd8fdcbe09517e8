"""Hyperparameters as flat JSON."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plugframe.errors import SettingError

_PLAIN = (str, int, float, bool, type(None))


def flattened(params: Any) -> dict[str, Any]:
    """Return hyperparameters with nested names joined by ``/``, and JSON values.

    Raises:
        SettingError: for what has no names, for two values of one name, or for a container that holds itself.
    """
    fields = _fields(params)
    if fields is None:
        raise SettingError(
            f"log_hyperparams() takes a mapping, a dataclass object or a namespace, got {type(params).__name__}: write "
            "log_hyperparams({'name': value})."
        )
    found: dict[str, Any] = {}
    _flatten("", fields, found, (id(params),))
    return found


def _flatten(prefix: str, fields: Mapping[Any, Any], found: dict[str, Any], outer: tuple[int, ...]) -> None:
    for key, value in fields.items():
        name = f"{prefix}{key}"
        inner = _fields(value)
        if isinstance(value, (list, tuple)) and any(_fields(each) is not None for each in value):
            inner = dict(enumerate(value))
        if inner:
            if id(value) in outer:
                raise _holds_itself(name)
            _flatten(f"{name}/", inner, found, (*outer, id(value)))
        elif name in found:
            raise SettingError(f"log_hyperparams(): there are two values named {name!r}: rename one.")
        else:
            found[name] = _json(name, value, outer)


def _fields(value: Any) -> Mapping[Any, Any] | None:
    """Return the names and values in a container; None if it has no names."""
    if isinstance(value, Mapping):
        return value
    if isinstance(value, argparse.Namespace):
        return vars(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    return None


def _json(name: str, value: Any, outer: tuple[int, ...]) -> Any:
    if type(value) in _PLAIN:
        return value
    if isinstance(value, (list, tuple)):
        if id(value) in outer:
            raise _holds_itself(name)
        return [_json(name, each, (*outer, id(value))) for each in value]
    return plain_number(value) if is_number(value) else str(value)


def _holds_itself(name: str) -> SettingError:
    return SettingError(f"log_hyperparams(): {name!r} holds itself: leave it out.")


def is_number(value: Any) -> bool:
    """Return whether a value is a real number of Python, NumPy or torch, which JSON can hold."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex() and not value.is_quantized
    if isinstance(value, (str, bytes)):
        return False
    # Subclasses too, such as IntEnum: what is no plain number has a name that says more.
    dtype = getattr(value, "dtype", None)
    return dtype is not None and getattr(value, "size", 0) == 1 and getattr(dtype, "kind", "") in ("b", "i", "u", "f")


def plain_number(value: Any) -> int | float | bool:
    """Return a number of NumPy or torch as one of Python."""
    number: int | float | bool = value.detach().item() if isinstance(value, Tensor) else value.item()
    return number
