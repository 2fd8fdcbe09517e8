"""The plan of a save: torch's own, of pieces that are plain tensors already."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from plugframe.checkpoint import StoredTensor
from plugframe_builtins._shared.sharded_checkpoint.partition import Piece


class PiecePlanner(DefaultSavePlanner):
    """Plans pieces; the state it is given holds their values by name, perhaps copies of them.

    Args:
        pieces: by name; only their places count.
        error: what went wrong on this rank before. The plan fails of it, on all ranks.
    """

    def __init__(self, pieces: Mapping[str, Piece], *, error: Exception | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces
        self._error = error

    def create_local_plan(self) -> SavePlan:
        """Return one write for each piece."""
        if self._error is not None:
            raise self._error
        self.plan = SavePlan([_item(name, piece) for name, piece in self._pieces.items()])
        return self.plan

    def lookup_object(self, index: MetadataIndex) -> Tensor | StoredTensor:
        """Return a piece's values."""
        value: Tensor | StoredTensor = self.state_dict[index.fqn]
        return value


def _item(name: str, piece: Piece) -> WriteItem:
    offsets, sizes = torch.Size(piece.offsets), torch.Size(piece.tensor.shape)
    return WriteItem(
        index=MetadataIndex(name, offsets),
        type=WriteItemType.SHARD,
        tensor_data=TensorWriteData(
            chunk=ChunkStorageMetadata(offsets=offsets, sizes=sizes),
            properties=TensorProperties(dtype=piece.tensor.dtype),
            size=torch.Size(piece.shape),
        ),
    )
