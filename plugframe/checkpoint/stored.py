"""Tensors that lie in a checkpoint, verified, and are read when they are needed."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from plugframe.utils.shards import view_locally


class Source(Protocol):
    """What can read tensors of one checkpoint by name."""

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Put the named tensors into `targets`: of the same (global) shape each, of any dtype, on any device.

        A target may be a ``DTensor``: then only this rank's part is read. No other rank need call it.
        """
        ...


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a checkpoint.

    Attributes:
        name: by which its source knows it.
        shape: of the whole tensor.
        dtype: in which it was saved.
        source: that reads it.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: Source

    @property
    def nbytes(self) -> int:
        """Return the size of the whole tensor in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the whole tensor, on the CPU."""
        if isinstance(self.source, Viewed):
            whole = self.source.base.read()
            return torch.view_as_complex(whole) if self.dtype.is_complex else whole.view(self.dtype)
        whole = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.source.fill({self.name: whole})
        return whole


def viewed(base: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """Return a stored tensor whose bytes are taken for another dtype: complex of pairs of reals, or as wide.

    Raises:
        ValueError: if that cannot be.
    """
    shape = base.shape
    if dtype.is_complex:
        if shape[-1:] != (2,) or base.dtype.to_complex() is not dtype:
            raise ValueError(f"{base.name!r} of {base.dtype} and shape {tuple(shape)} holds no {dtype}")
        shape = shape[:-1]
    elif base.dtype.itemsize != dtype.itemsize:
        raise ValueError(f"{base.name!r} of {base.dtype} holds no {dtype}")
    return StoredTensor(base.name, shape, dtype, Viewed(base, dtype))


@dataclass(frozen=True, eq=False)
class Viewed:
    """The source of a `viewed` tensor."""

    base: StoredTensor
    dtype: torch.dtype

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Put the tensor into its targets, by way of one of its own dtype where they have another."""
        for target in targets.values():
            fits = target.is_complex() if self.dtype.is_complex else target.dtype is self.dtype
            own = target if fits else torch.empty_like(target, dtype=self.dtype)
            self.base.source.fill({self.base.name: view_locally(own, self._as_base)})
            if own is not target:
                target.copy_(own)

    def _as_base(self, part: Tensor) -> Tensor:
        return torch.view_as_real(part) if part.is_complex() else part.view(self.base.dtype)


@torch.no_grad()
def fill(pairs: Iterable[tuple[Tensor, Tensor | StoredTensor]]) -> None:
    """Copy values into targets of the same (global) shape, of a ``DTensor`` only this rank's part.

    Args:
        pairs: a target (a Tensor or DTensor, on any device) and what it becomes (a whole tensor), each.
    """
    from torch.distributed.tensor import DTensor, distribute_tensor  # it takes long to import

    by_source: dict[int, tuple[Source, dict[str, Tensor]]] = {}
    for target, value in pairs:
        if isinstance(value, StoredTensor):
            # One tensor may go to several places.
            _, wanted = by_source.setdefault(id(value.source), (value.source, {}))
            if value.name in wanted:
                value.source.fill({value.name: target.detach()})
            else:
                wanted[value.name] = target.detach()
        elif isinstance(target, DTensor):
            whole = value.to(target.device)
            part = distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(part.to_local())
        else:
            target.copy_(value)
    for source, wanted in by_source.values():
        source.fill(wanted)


def materialize(tree: Any) -> Any:
    """Return `tree` (dicts, lists, tuples) with every `StoredTensor` read whole, each once."""
    return _materialized(tree, {})


def _materialized(tree: Any, read: dict[int, Tensor]) -> Any:
    if isinstance(tree, StoredTensor):
        if id(tree) not in read:
            read[id(tree)] = tree.read()
        return read[id(tree)]
    if type(tree) is dict:
        return {key: _materialized(value, read) for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)([_materialized(value, read) for value in tree])
    return tree
