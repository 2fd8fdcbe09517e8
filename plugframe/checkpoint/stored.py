"""Tensors in a checkpoint that are read and verified on demand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from plugframe.utils.shards import view_locally
from plugframe.utils.tree import map_leaves


class Source(Protocol):
    """Reads tensors of one checkpoint by name."""

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read the named tensors into `targets` of the same (global) shapes, of any dtype, on any device.

        Of a ``DTensor`` only this rank's shard is read. Other ranks need not call it.
        """
        ...


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor in a checkpoint.

    Attributes:
        name: name in the source.
        shape: global shape.
        dtype: saved dtype.
        source: reads the tensor.
    """

    name: str
    shape: torch.Size
    dtype: torch.dtype
    source: Source

    @property
    def nbytes(self) -> int:
        """Return the size of the full tensor in bytes."""
        return self.shape.numel() * self.dtype.itemsize

    def read(self) -> Tensor:
        """Return the full tensor, on the CPU."""
        if isinstance(self.source, Viewed):
            full = self.source.base.read()
            return torch.view_as_complex(full) if self.dtype.is_complex else full.view(self.dtype)
        full = torch.empty(self.shape, dtype=self.dtype, device="cpu")
        self.source.fill({self.name: full})
        return full


def viewed(base: StoredTensor, dtype: torch.dtype) -> StoredTensor:
    """Return a stored tensor viewed as another dtype: complex from pairs of reals, or of the same item size.

    Raises:
        ValueError: if the dtypes do not match.
    """
    shape = base.shape
    if dtype.is_complex:
        if shape[-1:] != (2,) or base.dtype.to_complex() is not dtype:
            raise ValueError(f"{base.name!r} of {base.dtype} and shape {tuple(shape)} cannot be viewed as {dtype}")
        shape = shape[:-1]
    elif base.dtype.itemsize != dtype.itemsize:
        raise ValueError(f"{base.name!r} of {base.dtype} cannot be viewed as {dtype}")
    return StoredTensor(base.name, shape, dtype, Viewed(base, dtype))


@dataclass(frozen=True, eq=False)
class Viewed:
    """The source of a `viewed` tensor."""

    base: StoredTensor
    dtype: torch.dtype

    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read the tensor into its targets; through a temporary tensor where their dtype differs."""
        for target in targets.values():
            matches = target.is_complex() if self.dtype.is_complex else target.dtype is self.dtype
            own = target if matches else torch.empty_like(target, dtype=self.dtype)
            self.base.source.fill({self.base.name: view_locally(own, self._as_base)})
            if own is not target:
                target.copy_(own)

    def _as_base(self, part: Tensor) -> Tensor:
        return torch.view_as_real(part) if part.is_complex() else part.view(self.base.dtype)


@torch.no_grad()
def fill(pairs: Iterable[tuple[Tensor, Tensor | StoredTensor]]) -> None:
    """Copy values into targets of the same (global) shape; into a ``DTensor`` only this rank's shard.

    Args:
        pairs: targets (a Tensor or DTensor, on any device), each with its new value (a full tensor).
    """
    from torch.distributed.tensor import DTensor, distribute_tensor  # slow to import

    by_source: dict[int, tuple[Source, dict[str, Tensor]]] = {}
    for target, value in pairs:
        if isinstance(value, StoredTensor):
            # One tensor may have several targets.
            _, wanted = by_source.setdefault(id(value.source), (value.source, {}))
            if value.name in wanted:
                value.source.fill({value.name: target.detach()})
            else:
                wanted[value.name] = target.detach()
        elif isinstance(target, DTensor):
            full = value.to(target.device)
            part = distribute_tensor(full, target.device_mesh, target.placements, src_data_rank=None)
            target.to_local().copy_(part.to_local())
        else:
            target.copy_(value)
    for source, wanted in by_source.values():
        source.fill(wanted)


def materialize(tree: Any) -> Any:
    """Return `tree` with every `StoredTensor` read completely, each once."""
    tensors: dict[int, Tensor] = {}

    def read(stored: StoredTensor) -> Tensor:
        if id(stored) not in tensors:
            tensors[id(stored)] = stored.read()
        return tensors[id(stored)]

    return map_leaves(read, tree, StoredTensor)
