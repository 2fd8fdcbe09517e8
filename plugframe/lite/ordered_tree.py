"""Nested data in an order that is the same on all ranks: mappings go by key."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

_ADDRESS = re.compile(r" at 0x[0-9a-f]+")


def walk(fn: Callable[[str, Any], Any], data: Any, path: str = "", *, lists: bool = True) -> Any:
    """Return `data` with ``fn(path, value)`` in place of every value that is no container.

    The order is the same on all ranks: mappings go by sorted key. Containers keep their types and their order;
    one in which nothing changed is returned itself.

    Args:
        lists: whether a list is a container; if not, ``fn`` gets it.
    """
    if isinstance(data, Mapping):
        values = {key: walk(fn, data[key], f"{path}[{label}]", lists=lists) for label, key in _keys(data)}
        if all(values[key] is data[key] for key in values):
            return data
        values = {key: values[key] for key in data}
        return values if type(data) is dict else _like(data, values)
    if isinstance(data, tuple) and hasattr(data, "_fields"):
        named: Any = data
        items = [
            walk(fn, value, f"{path}.{name}", lists=lists) for name, value in zip(named._fields, data, strict=True)
        ]
        return data if _same(items, data) else type(data)(*items)
    if isinstance(data, tuple) or (lists and isinstance(data, list)):
        items = [walk(fn, value, f"{path}[{number}]", lists=lists) for number, value in enumerate(data)]
        return data if _same(items, data) else type(data)(items)
    if dataclasses.is_dataclass(data) and not isinstance(data, type):
        names = [field.name for field in dataclasses.fields(data)]
        items = [walk(fn, getattr(data, name), f"{path}.{name}", lists=lists) for name in names]
        if _same(items, [getattr(data, name) for name in names]):
            return data
        made = copy.copy(data)
        for name, value in zip(names, items, strict=True):
            object.__setattr__(made, name, value)
        return made
    return fn(path, data)


def _same(new: Sequence[Any], old: Sequence[Any]) -> bool:
    return all(one is other for one, other in zip(new, old, strict=True))


def _keys(data: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Return keys with what they are called on every rank, sorted by that."""
    found: dict[str, Any] = {}
    for key in data:
        label = _ADDRESS.sub("", repr(key))
        while label in found:
            label += "'"
        found[label] = key
    return sorted(found.items(), key=lambda item: item[0])


def _like(data: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    """Return a mapping of the user's own class, with what else it holds, and `values`."""
    made: Any = copy.copy(data)
    for key, value in values.items():
        made[key] = value
    return made


def containers(data: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield path and size of every container, because paths of values omit some, such as an empty list."""
    if isinstance(data, Mapping):
        keys = _keys(data)
        shown = ", ".join(label for label, _ in keys)
        yield path, f"a mapping with {shown or 'no'} key{'s' * (len(keys) != 1)}"
        for label, key in keys:
            yield from containers(data[key], f"{path}[{label}]")
    elif isinstance(data, (list, tuple)):
        yield path, f"a {'tuple' if isinstance(data, tuple) else 'list'} of {len(data)}"
        for number, value in enumerate(data):
            yield from containers(value, f"{path}[{number}]")
    elif dataclasses.is_dataclass(data) and not isinstance(data, type):
        yield path, f"a {type(data).__name__}"
        for field in dataclasses.fields(data):
            yield from containers(getattr(data, field.name), f"{path}.{field.name}")
