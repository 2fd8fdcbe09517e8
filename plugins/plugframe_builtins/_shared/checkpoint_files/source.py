"""Read stored tensors into targets: complete tensors, or this rank's shard of a ``DTensor``."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from plugframe.checkpoint import StoredTensor, as_bytes
from plugframe.errors import CheckpointError
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Chunk, Index

#: Most memory a read needs besides its target.
_PIECE_BYTES = 16 * 1024 * 1024

#: Gaps up to this size are read along: cheaper than a read per part.
_GAP_BYTES = 256 * 1024


class FileSource:
    """Read tensors of one checkpoint by name; see `plugframe.checkpoint.Source`."""

    def __init__(self, found: Index, files: Files) -> None:
        self.found = found
        self.files = files

    def tensors(self) -> dict[str, StoredTensor]:
        """Return a lazy `StoredTensor` per tensor."""
        return {
            name: StoredTensor(name, torch.Size(laid.shape), laid.dtype, self)
            for name, laid in self.found.tensors.items()
        }

    @torch.no_grad()
    def fill(self, targets: Mapping[str, Tensor]) -> None:
        """Read the named tensors into `targets`; torch's planner chooses the chunks."""
        state: dict[str, Any] = {name: target.detach() for name, target in targets.items()}
        planner = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        reader = ChunkReader(self.found, self.files, targets)
        try:
            metadata = reader.read_metadata()
            planner.set_up_planner(state, metadata, True)
            reader.set_up_storage_reader(metadata, True)
            plan = reader.prepare_local_plan(planner.create_local_plan())
            plan = reader.prepare_global_plan(planner.create_global_plan([plan]))[0]
            reader.read_data(planner.finish_plan(plan), planner).wait()
        except OSError as error:
            raise CheckpointError(f"cannot read {self.found.path}: {error.strerror or error}.") from error
        except ValueError as error:
            raise CheckpointError(f"{self.found.path} does not fit what it is loaded into: {error}.") from error


class ChunkReader(StorageReader):
    """Serve the chunks of a checkpoint to torch's planners."""

    def __init__(self, found: Index, files: Files, names: Mapping[str, Any]) -> None:
        self._found = found
        self._files = files
        self._names = list(names)
        self._chunks: dict[tuple[str, torch.Size], Chunk] = {}
        self._buffer = torch.empty(0, dtype=torch.uint8, device="cpu")

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: a reader serves a single call."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the planner's metadata of the requested tensors."""
        tensors = {name: self._found.tensors[name] for name in self._names}
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=laid.dtype),
                    torch.Size(laid.shape),
                    [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in laid.chunks],
                )
                for name, laid in tensors.items()
            }
        )

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Index the chunks by position."""
        for name in self._names:
            for chunk in self._found.tensors[name].chunks:
                self._chunks[name, torch.Size(chunk.offsets)] = chunk

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Read every box of the plan into its target."""
        for item in plan.items:
            name, offset = item.storage_index.fqn, item.storage_index.offset
            assert offset is not None
            target = planner.resolve_tensor(item).detach()
            box = _Box(name, self._found.tensors[name].dtype, self._chunks[name, offset])
            self._read(box, tuple(item.storage_offsets), tuple(item.lengths), target)
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False: a reader cannot be made from a path."""
        return False

    def _read(self, box: _Box, offsets: tuple[int, ...], lengths: tuple[int, ...], target: Tensor) -> None:
        wanted = math.prod(lengths) * box.itemsize
        if not wanted:
            return
        strides = box.strides
        span = (sum((n - 1) * stride for n, stride in zip(lengths, strides, strict=True)) + 1) * box.itemsize
        start = box.chunk.start + sum(a * b for a, b in zip(offsets, strides, strict=True)) * box.itemsize
        file, what = box.chunk.file, f"tensor {box.name!r}"
        if span == wanted and target.is_cpu and target.dtype == box.dtype and target.is_contiguous():
            self._files.read_into(as_bytes(target), file, start, what)
        elif span <= _PIECE_BYTES and (span <= _GAP_BYTES or span <= 2 * wanted):
            buffer = self._scratch(span)
            self._files.read_into(as_bytes(buffer), file, start, what)
            target.copy_(buffer.view(box.dtype).as_strided(lengths, strides))
        else:
            self._read_slices(box, offsets, lengths, target)

    def _read_slices(self, box: _Box, offsets: tuple[int, ...], lengths: tuple[int, ...], target: Tensor) -> None:
        """Read a box in slices along its first dimension with more than one element."""
        dim = next(number for number, length in enumerate(lengths) if length > 1)
        row_bytes = box.strides[dim] * box.itemsize
        dense = math.prod(lengths[dim + 1 :]) * box.itemsize * 2 >= row_bytes
        rows = min(lengths[dim] - 1, max(1, (_PIECE_BYTES if dense else _GAP_BYTES) // row_bytes))
        for at in range(0, lengths[dim], rows):
            count = min(rows, lengths[dim] - at)
            moved = (*offsets[:dim], offsets[dim] + at, *offsets[dim + 1 :])
            self._read(box, moved, (*lengths[:dim], count, *lengths[dim + 1 :]), target.narrow(dim, at, count))

    def _scratch(self, size_bytes: int) -> Tensor:
        if self._buffer.numel() < size_bytes:
            self._buffer = torch.empty(size_bytes, dtype=torch.uint8, device="cpu")
        return self._buffer[:size_bytes]


class _Box:
    """A chunk of a tensor, in elements."""

    def __init__(self, name: str, dtype: torch.dtype, chunk: Chunk) -> None:
        self.name = name
        self.dtype = dtype
        self.itemsize = dtype.itemsize
        self.chunk = chunk
        self.strides = tuple(math.prod(chunk.sizes[dim + 1 :]) for dim in range(len(chunk.sizes)))
