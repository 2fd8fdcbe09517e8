"""Count and slice the samples of a batch."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from plugframe.errors import SettingError


def count(batch: Any) -> int:
    """Return the number of samples: the first dimension of every tensor and array in `batch` with dimensions.

    Raises:
        SettingError: if there is none, or if they differ.
    """
    rows = sorted({int(array.shape[0]) for array in _arrays(batch)})
    if len(rows) == 1:
        return rows[0]
    found = f"tensors of {' and '.join(map(str, rows))} rows" if rows else "no tensor with rows"
    raise SettingError(
        f"The batch has {found}: say how it is divided, as in run(batch, step, size=len(batch), "
        "take=lambda batch, start, stop: batch[start:stop])."
    )


def take(batch: Any, start: int, stop: int, *, size: int) -> Any:
    """Return samples `start` to `stop` of `batch` with `size` samples: views, in containers of the same types.

    Besides tensors and arrays, lists of `size` plain values (strings, paths) are sliced; all else is repeated.
    """
    if _has_rows(batch):
        return batch[start:stop]
    if isinstance(batch, Mapping):
        return _mapping(batch, {key: take(value, start, stop, size=size) for key, value in batch.items()})
    if isinstance(batch, list) and len(batch) == size and next(_arrays(batch), None) is None:
        return batch[start:stop]
    if isinstance(batch, (list, tuple)):
        values = [take(value, start, stop, size=size) for value in batch]
        return type(batch)(*values) if hasattr(batch, "_fields") else type(batch)(values)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        part = copy.copy(batch)
        for field in dataclasses.fields(batch):
            # Frozen dataclasses too: the copy is not shared yet.
            object.__setattr__(part, field.name, take(getattr(batch, field.name), start, stop, size=size))
        return part
    return batch


def _mapping(batch: Mapping[Any, Any], values: dict[Any, Any]) -> Any:
    if type(batch) is dict:
        return values
    part: Any = copy.copy(batch)  # a user's class keeps its other attributes
    for key, value in values.items():
        part[key] = value
    return part


def _has_rows(value: Any) -> bool:
    shape = getattr(value, "shape", None)
    return isinstance(shape, tuple) and len(shape) > 0


def _arrays(batch: Any) -> Iterator[Any]:
    if _has_rows(batch):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _arrays(value)
    elif isinstance(batch, (list, tuple)):
        for value in batch:
            yield from _arrays(value)
    elif dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        for field in dataclasses.fields(batch):
            yield from _arrays(getattr(batch, field.name))
