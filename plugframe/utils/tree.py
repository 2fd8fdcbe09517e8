"""Traverse batches: nested mappings, sequences, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module


def map_tensors(fn: Callable[[Tensor], Any], data: Any) -> Any:
    """Return `data` with every tensor replaced by ``fn(tensor)``; `data` itself if nothing changed.

    Container types are preserved. Other objects are left unchanged.
    """
    if isinstance(data, Tensor):
        return fn(data)
    if isinstance(data, Mapping):
        return _map_mapping(fn, data)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        values = [map_tensors(fn, value) for value in data]
        return data if _same(values, data) else type(data)(*values)
    if isinstance(data, (list, tuple)):
        values = [map_tensors(fn, value) for value in data]
        return data if _same(values, data) else type(data)(values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _map_dataclass(fn, data)
    return data


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _map_mapping(fn: Callable[[Tensor], Any], data: Mapping[Any, Any]) -> Any:
    values = {key: map_tensors(fn, value) for key, value in data.items()}
    if _same(values.values(), data.values()):
        return data
    if type(data) is dict:
        return values
    # A custom mapping class (defaultdict, BatchEncoding): a shallow copy preserves its other attributes.
    result: Any = copy.copy(data)
    for key, value in values.items():
        result[key] = value
    return result


def _map_dataclass(fn: Callable[[Tensor], Any], data: Any) -> Any:
    names = [field.name for field in dataclasses.fields(data)]
    old = [getattr(data, name) for name in names]
    new = [map_tensors(fn, value) for value in old]
    if _same(new, old):
        return data
    result = copy.copy(data)
    for name, value in zip(names, new, strict=True):
        object.__setattr__(result, name, value)
    return result


def leaves(data: Any, *, depth: int = 8) -> Iterator[Any]:
    """Yield all leaves of `data`: tensors, numbers, objects.

    A dataclass, or an object with tensors in its attributes, is yielded before its contents.

    Args:
        depth: maximum number of levels: objects may refer to each other.
    """
    inside: Any = ()
    if isinstance(data, Mapping):
        inside = data.values()
    elif isinstance(data, (list, tuple)):
        inside = data
    else:
        yield data
        if not isinstance(data, (Tensor, Module, type)) and hasattr(data, "__dict__"):
            inside = [value for value in vars(data).values() if _is_data(value)]
    if depth:
        for value in inside:
            yield from leaves(value, depth=depth - 1)


def _is_data(value: Any) -> bool:
    return isinstance(value, (Tensor, Mapping, list, tuple)) or dataclasses.is_dataclass(value)
