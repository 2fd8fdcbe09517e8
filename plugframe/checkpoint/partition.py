"""Assign tensors to ranks for writing: every value once, and about equal sizes per rank."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from plugframe.checkpoint.stored import StoredTensor
from plugframe.errors import CheckpointError
from plugframe.utils.shards import is_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor

#: Rank 0 writes replicated tensors below this size, and its own value of those that differ by rank.
SMALL_BYTES = 64 * 1024


class Row(NamedTuple):
    """Properties of a tensor that ranks compare."""

    kind: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Piece:
    """The part of one tensor that a rank writes.

    Attributes:
        tensor: a plain tensor, or one stored in another checkpoint.
        offsets: origin in the full tensor.
        shape: of the full tensor.
    """

    tensor: Tensor | StoredTensor
    offsets: tuple[int, ...]
    shape: tuple[int, ...]


def table(tensors: Mapping[str, Tensor | StoredTensor]) -> dict[str, Row]:
    """Return the rows to compare: of sharded tensors, and of large ones."""
    return {
        name: Row("part" if is_shard(tensor) else "whole", str(tensor.dtype), tuple(tensor.shape))
        for name, tensor in tensors.items()
        if is_shard(tensor) or tensor.nbytes >= SMALL_BYTES
    }


def digest(rows: Mapping[str, Row]) -> bytes:
    """Return a short digest, equal for equal tables."""
    return hashlib.sha256(repr(sorted(rows.items())).encode("utf-8", "backslashreplace")).digest()


def common(tables: Sequence[Mapping[str, Row]], *, where: str) -> set[str]:
    """Return the names of the tensors that are equal on all ranks.

    Raises:
        CheckpointError: on all ranks, if the ranks hold shards of different tensors.
    """
    for rank, rows in enumerate(tables):
        for name in {**tables[0], **rows}:
            ours, others = tables[0].get(name), rows.get(name)
            if ours != others and "part" in [row.kind for row in (ours, others) if row is not None]:
                raise CheckpointError(
                    f"cannot save {where}, nothing was written: {name!r} is {_spell(ours)} on rank 0 and "
                    f"{_spell(others)} on rank {rank}: let every rank save its shard of the same tensors."
                )
    return {name for name, row in tables[0].items() if all(rows.get(name) == row for rows in tables)}


def _spell(row: Row | None) -> str:
    return f"a {row.kind} of shape {row.shape} and {row.dtype}" if row else "missing"


def portion(
    tensors: Mapping[str, Tensor | StoredTensor], shared: set[str], *, rank: int, num_ranks: int
) -> dict[str, Piece]:
    """Return the pieces that this rank writes.

    Args:
        tensors: all tensors of this rank.
        shared: names of tensors that are equal on all ranks.
        rank: this rank.
        num_ranks: number of ranks.
    """
    mine: dict[str, Piece] = {}
    load = [0] * num_ranks
    for name, tensor in tensors.items():
        if is_shard(tensor):
            piece = _part(name, tensor, rank)
            if piece is not None:
                mine[name] = piece
            continue
        writer = min(range(num_ranks), key=load.__getitem__) if name in shared else 0
        load[writer] += tensor.nbytes if name in shared else 0
        if writer == rank:
            mine[name] = Piece(tensor, (0,) * len(tensor.shape), tuple(tensor.shape))
    return mine


def _part(name: str, tensor: DTensor, rank: int) -> Piece | None:
    """Return this rank's shard of a ``DTensor``, None if it has none or another rank writes a replica."""
    if tensor.numel() == 0:
        empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
        return Piece(empty, (0,) * tensor.dim(), tuple(tensor.shape)) if rank == 0 else None
    coordinate = tensor.device_mesh.get_coordinate()
    local = tensor.to_local()
    if coordinate is None or local.numel() == 0:
        return None
    number, copies = 0, 1
    for at, size, placement in zip(coordinate, tensor.device_mesh.shape, tensor.placements, strict=True):
        if placement.is_replicate():
            number, copies = number * size + at, copies * size
    if zlib.crc32(name.encode("utf-8", "backslashreplace")) % copies != number:
        return None
    (chunk,) = tensor.__create_chunk_list__()  # type: ignore[no-untyped-call]
    return Piece(local, tuple(chunk.offsets), tuple(tensor.shape))
