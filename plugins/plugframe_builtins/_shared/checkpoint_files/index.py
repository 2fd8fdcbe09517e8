"""The index of a checkpoint: its tensors, their chunks in files, and the state's structure."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from plugframe_builtins._shared.checkpoint_files.tensor_file import Slot


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, stored row-major and contiguously in a file.

    Attributes:
        offsets: its origin in the tensor.
        sizes: its extent in each dimension.
        file: the file's name in its folder.
        start: byte offset in the file.
        xxh3: checksum of each of its segments; None if the format has none.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    xxh3: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class TensorLayout:
    """A tensor and the chunks that cover it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of the full tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def one_chunk(slot: Slot, data_at: int, *, xxh3: tuple[str, ...] | None = None) -> TensorLayout:
    """Return a tensor stored contiguously in the only file, whose tensor data begins at `data_at`."""
    origin = (0,) * len(slot.shape)
    chunk = Chunk(offsets=origin, sizes=slot.shape, file="", start=data_at + slot.start, xxh3=xxh3)
    return TensorLayout(dtype=slot.dtype, shape=slot.shape, chunks=(chunk,))


@dataclass(frozen=True, kw_only=True)
class Gap:
    """Bytes of a file between its chunks, such as the headers of torch's archives, with a checksum per segment."""

    start: int
    size_bytes: int
    xxh3: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Head:
    """Size and header checksum of a file.

    Attributes:
        size_bytes: of the complete file.
        head_bytes: bytes before the first chunk.
        xxh3: checksum of those; None if they are verified already.
        gaps: other bytes that belong to no chunk.
    """

    size_bytes: int
    head_bytes: int
    xxh3: str | None
    gaps: tuple[Gap, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Index:
    """A checkpoint whose tensors are not read yet.

    Attributes:
        path: the checkpoint's path.
        format: the name of its format.
        version: of the format; 0 if it has none.
        size_bytes: total size of its files.
        structure: builds the state tree from the tensors; see `plugframe.checkpoint.join`.
        tensors: by name.
        files: by name in the folder; a single-file checkpoint has one entry with an empty name.
        info: plain values about the run that saved it.
        identity: unique to this checkpoint.
    """

    path: str
    format: str
    version: int
    size_bytes: int
    structure: Any
    tensors: Mapping[str, TensorLayout]
    files: Mapping[str, Head]
    info: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
