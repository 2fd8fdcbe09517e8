"""Explain why a value cannot be saved, and what to save instead."""

from __future__ import annotations

import argparse
import collections
import dataclasses
import datetime
import decimal
import enum
import fractions
import os
from typing import Any

import torch
from torch import Tensor

from plugframe.utils.shards import is_shard

_HINTS: tuple[tuple[type | tuple[type, ...], str], ...] = (
    (argparse.Namespace, "save vars({}) instead"),
    ((set, frozenset), "save sorted({}) instead"),
    ((collections.deque, range), "save list({}) instead"),
    ((bytearray, memoryview), "save bytes({}) instead"),
    (enum.Enum, "save {}.value instead"),
    (torch.Generator, "save {}.get_state() instead"),
    ((os.PathLike, torch.device, fractions.Fraction, decimal.Decimal), "save str({}) instead"),
    ((datetime.date, datetime.time), "save {}.isoformat() instead"),
    (type, "code is never saved; save its name instead"),
)
_PLAIN = "save its values as dict, list, tuple, tensor, str, bytes, int, float, bool or None instead"


def describe(value: Any) -> str:
    """Return the type of `value` with an article: ``an argparse.Namespace``."""
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def refuse(value: Any, name: str) -> str:
    """Return a message that `value`, found at `name`, cannot be saved, and what to save instead."""
    return f"{name} is {describe(value)}: {_hint(value).format(name)}"


def _hint(value: Any) -> str:
    for kind, hint in _HINTS:
        if isinstance(value, kind):
            return hint
    if callable(getattr(value, "state_dict", None)):
        return "save {}.state_dict() instead"
    if dataclasses.is_dataclass(value):
        return "save dataclasses.asdict({}) instead"
    if callable(value):
        return "code is never saved; save its name instead"
    return _PLAIN


def refuse_tensor(value: Tensor, name: str, *, sharded: bool = False) -> str | None:
    """Return why a tensor cannot be saved, None if it can; a ``DTensor`` can only if `sharded`."""
    if sharded and is_shard(value):
        if any(placement.is_partial() for placement in value.placements):
            return f"{name} is a DTensor with partial placements: save {name}.full_tensor() instead"
        return refuse_tensor(value.to_local(), name)
    if type(value.detach()) is not Tensor:
        how = "full_tensor()" if hasattr(value, "full_tensor") else "as_subclass(torch.Tensor)"
        return f"{name} is {describe(value)}, a subclass of Tensor: save {name}.{how} instead"
    if value.is_meta:
        return f"{name} is on the meta device and has no values: materialise it first"
    if value.is_quantized:
        return f"{name} is quantized: save {name}.dequantize() instead"
    if value.layout != torch.strided or value.is_nested:
        kind = "nested" if value.is_nested else str(value.layout).removeprefix("torch.")
        how = "unbind()" if value.is_nested else "to_dense()"
        return f"{name} is a {kind} tensor: save {name}.{how} instead"
    if value.numel() and _storage_bytes(value) == 0:
        return f"{name} has no storage: its memory was freed, perhaps by the strategy that shards it"
    return None


def _storage_bytes(value: Tensor) -> int | None:
    try:
        return value.untyped_storage().nbytes()
    except RuntimeError:
        # Some devices have no accessible storage; their tensors are copied to the CPU before they are read.
        return None
