"""Map over and iterate nested containers: mappings, sequences, named tuples and dataclasses."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.nn import Module

LeafType = type | tuple[type, ...]


def map_tensors(fn: Callable[[Tensor], Any], data: Any) -> Any:
    """Return `data` with ``fn(tensor)`` in place of every tensor; `data` itself where nothing changed.

    Containers keep their types; objects with a ``to`` method of their own are unchanged.
    """
    return map_leaves(fn, data, Tensor)


def map_leaves(fn: Callable[[Any], Any], data: Any, leaf_type: LeafType) -> Any:
    """Return `data` with ``fn(leaf)`` in place of each instance of `leaf_type`; `data` itself where nothing changed."""
    if isinstance(data, leaf_type):
        return fn(data)
    if isinstance(data, Mapping):
        return _map_mapping(fn, data, leaf_type)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        values = [map_leaves(fn, value, leaf_type) for value in data]
        return data if _same(values, data) else type(data)(*values)
    if isinstance(data, (list, tuple)):
        values = [map_leaves(fn, value, leaf_type) for value in data]
        return data if _same(values, data) else type(data)(values)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        return _map_dataclass(fn, data, leaf_type)
    return data


def _same(new: Any, old: Any) -> bool:
    return all(a is b for a, b in zip(new, old, strict=True))


def _map_mapping(fn: Callable[[Any], Any], data: Mapping[Any, Any], leaf_type: LeafType) -> Any:
    values = {key: map_leaves(fn, value, leaf_type) for key, value in data.items()}
    if _same(values.values(), data.values()):
        return data
    if type(data) is dict:
        return values
    # A user's mapping class (a defaultdict, a BatchEncoding): a shallow copy keeps its other attributes.
    result: Any = copy.copy(data)
    for key, value in values.items():
        result[key] = value
    return result


def _map_dataclass(fn: Callable[[Any], Any], data: Any, leaf_type: LeafType) -> Any:
    names = [field.name for field in dataclasses.fields(data)]
    old = [getattr(data, name) for name in names]
    new = [map_leaves(fn, value, leaf_type) for value in old]
    if _same(new, old):
        return data
    result = copy.copy(data)
    for name, value in zip(names, new, strict=True):
        object.__setattr__(result, name, value)
    return result


def leaves(data: Any, *, depth: int = 8) -> Iterator[Any]:
    """Yield everything in `data` that is not a container: tensors, numbers, objects.

    A dataclass, and a user's object with tensors in its attributes, are yielded before their contents.

    Args:
        depth: maximum number of levels: objects may reference each other.
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
