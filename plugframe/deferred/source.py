"""Deferred tensors whose values are read from somewhere, completely or in part, when they are materialized."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from plugframe.deferred.history import Geometry, Op, Record, Ref, attach

#: Along each dimension, from where to where.
Region = tuple[slice, ...]


class Source(Protocol):
    """Reads a tensor."""

    def read(self, region: Region | None) -> Tensor:
        """Return the values of a region, all of them for None, in memory of their own on the CPU."""
        ...

    def digest(self) -> str:
        """Return a short text that differs where the values do."""
        ...


class Reading:
    """The operation that creates a tensor from its source."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source = source
        self.device = device

    def __call__(self, region: Region | None = None) -> Tensor:
        return self.source.read(region).to(self.device)


def from_source(source: Source, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return a deferred tensor with the values of a source."""
    tensor = torch.empty_strided(shape, _contiguous(shape), dtype=dtype, device="meta")
    record = attach(tensor, device)
    operation = Op(Reading(source, device), (), {}, 1, [], torch.get_default_dtype())
    operation.outputs.append((0, weakref.ref(record), Geometry.of(tensor), tensor.untyped_storage().nbytes()))
    record.writes.append(operation)
    record.clock = 1
    return tensor


def digest_of(record: Record) -> str | None:
    """Return the digest of the source of a record, None if it has other values than those of one source."""
    reading = _reading(record)
    return None if reading is None else reading[0].source.digest()


def read_part(record: Record, geometry: Geometry, region: Region) -> Tensor | None:
    """Return a region of a deferred tensor without reading the others; None if its values are not just read."""
    found = _reading(record)
    if found is None or geometry.offset or geometry.conjugate or geometry.stride != _contiguous(geometry.size):
        return None
    reading, casts = found
    value = reading(region)
    for kwargs in casts:
        value = torch.ops.aten._to_copy(value, **kwargs)
    return value if value.dtype is geometry.dtype else None


def _reading(record: Record) -> tuple[Reading, list[dict[str, Any]]] | None:
    """Return the operation that reads a record's values, and the conversions after it."""
    casts: list[dict[str, Any]] = []
    while len(record.writes) == 1:
        (op,) = record.writes
        if isinstance(op.func, Reading):
            return op.func, casts[::-1]
        ref = op.args[0] if op.args else None
        plain: Callable[..., Any] = torch.ops.aten._to_copy.default
        if op.func is not plain or not isinstance(ref, Ref) or not _complete(ref):
            return None
        casts.append({name: value for name, value in op.kwargs.items() if name in ("dtype", "device")})
        record = ref.found()
    return None


def _complete(ref: Ref) -> bool:
    """Return whether an operation reads all of a storage."""
    size_bytes = ref.found().writes[0].outputs[0][3] if ref.found().writes and ref.found().writes[0].outputs else -1
    geometry = ref.geometry
    numel = 1
    for size in geometry.size:
        numel *= size
    plain = geometry.stride == _contiguous(geometry.size) and not geometry.offset and not geometry.conjugate
    return plain and numel * geometry.dtype.itemsize == size_bytes


def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))
