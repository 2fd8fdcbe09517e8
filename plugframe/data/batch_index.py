"""Look up which batch an object or the memory of a tensor belongs to."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from plugframe.utils.tree import leaves

if TYPE_CHECKING:
    from plugframe.data.loader_pass import LoaderPass

#: Number of leaves that are added before freed ones are removed from the index.
_MIN_LIMIT = 8


class BatchRecord:
    """A batch that was returned to the user.

    Attributes:
        weight: relative to the batches of the other ranks.
        loader_pass: the pass it was read in.
        matched: whether a model was called with any of it.
    """

    __slots__ = ("loader_pass", "matched", "refs", "weight")

    def __init__(self, weight: float, loader_pass: LoaderPass) -> None:
        self.weight = weight
        self.loader_pass = loader_pass
        self.matched = False
        self.refs: list[weakref.ref[Any]] = []

    def alive(self) -> bool:
        """Return whether any object of the batch is still referenced."""
        return any(ref() is not None for ref in self.refs)


class BatchIndex:
    """Looks up batches by the objects in them, and by the storages of their tensors."""

    def __init__(self) -> None:
        self._objects: dict[int, tuple[weakref.ref[Any], BatchRecord]] = {}
        self._storages: dict[int, list[tuple[weakref.ref[Any], int, int, BatchRecord]]] = {}
        # Counted, since the ids of freed objects are used again: the size of a dict does not show what is in its lists.
        self._added, self._limit = 0, _MIN_LIMIT

    def add(self, batch: Any, record: BatchRecord) -> None:
        """Add the objects of a batch."""
        for leaf in leaves(batch):
            try:
                ref = weakref.ref(leaf)
            except TypeError:  # a number, a string
                continue
            record.refs.append(ref)
            self._added += 1
            self._objects[id(leaf)] = (ref, record)
            if isinstance(leaf, Tensor):
                self._add_storage(leaf, ref, record)
        if self._added > self._limit:
            self._prune()

    def _add_storage(self, tensor: Tensor, ref: weakref.ref[Any], record: BatchRecord) -> None:
        span = _span(tensor)
        if span is None:
            return
        storage, start, end = span
        # A view that outlives the tensor keeps the storage alive. A tensor that covers only a part of its storage is
        # tracked itself: the storage may be that of an in-memory dataset, which is always alive.
        if end - start >= storage.nbytes():
            ref = weakref.ref(storage)
            record.refs.append(ref)
        self._storages.setdefault(id(storage), []).append((ref, start, end, record))

    def find(self, value: Any) -> BatchRecord | None:
        """Return the batch that an object, or the memory of a tensor, belongs to."""
        ref, record = self._objects.get(id(value), (None, None))
        if ref is not None and ref() is value:
            return record
        span = _span(value) if self._storages and isinstance(value, Tensor) else None
        if span is not None:
            storage, start, end = span
            for ref, first, last, record in self._storages.get(id(storage), ()):
                if first <= start and end <= last and start < end and ref() is not None:
                    return record
        return None

    def _prune(self) -> None:
        self._objects = {key: (ref, record) for key, (ref, record) in self._objects.items() if ref() is not None}
        alive = {key: [each for each in found if each[0]() is not None] for key, found in self._storages.items()}
        self._storages = {key: found for key, found in alive.items() if found}
        self._added, self._limit = 0, len(self._objects) + _MIN_LIMIT


def _span(tensor: Tensor) -> tuple[Any, int, int] | None:
    """Return the storage of a tensor, and the addresses of its first element and its end; None if not strided."""
    try:
        if tensor.layout is not torch.strided or tensor.device.type == "meta":
            return None
        storage = tensor.untyped_storage()
        start = tensor.data_ptr()
    except (RuntimeError, NotImplementedError):  # a subclass without memory of its own
        return None
    if not tensor.numel():
        return storage, start, start
    extent = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return storage, start, start + extent * tensor.element_size()
