"""The save planner: torch's own, for pieces that are plain tensors."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from plugframe.checkpoint import Piece, StoredTensor


class PiecePlanner(DefaultSavePlanner):
    """Plan pieces; the planner's state holds their values by name, possibly copies.

    Args:
        pieces: by name; only their positions are used.
        error: an earlier error of this rank; planning raises it on all ranks.
    """

    def __init__(self, pieces: Mapping[str, Piece], *, error: Exception | None = None) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._pieces = pieces
        self._error = error

    def create_local_plan(self) -> SavePlan:
        """Return a write item per piece."""
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
