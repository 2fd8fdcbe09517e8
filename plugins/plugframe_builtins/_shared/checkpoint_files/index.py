"""What lies at a path: tensors, of which chunks of files they are made, and a structure that names them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from plugframe_builtins._shared.checkpoint_files.tensor_file import Slot


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A box of a tensor, row-major in one piece of a file.

    Attributes:
        offsets: where in the tensor it begins.
        sizes: its extent in each dimension.
        file: the file's name in its folder.
        start: where in the file it begins.
        xxh3: of each of its segments; None if nobody knows.
    """

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    file: str
    start: int
    xxh3: tuple[str, ...] | None


@dataclass(frozen=True, kw_only=True)
class Laid:
    """A tensor and the chunks that fill it."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def size_bytes(self) -> int:
        """Return the size of the whole tensor."""
        return math.prod(self.shape) * self.dtype.itemsize


def laid_whole(slot: Slot, data_at: int, *, xxh3: tuple[str, ...] | None = None) -> Laid:
    """Return a tensor that lies in one piece in the one file, whose tensors begin at `data_at`."""
    origin = (0,) * len(slot.shape)
    chunk = Chunk(offsets=origin, sizes=slot.shape, file="", start=data_at + slot.start, xxh3=xxh3)
    return Laid(dtype=slot.dtype, shape=slot.shape, chunks=(chunk,))


@dataclass(frozen=True, kw_only=True)
class Head:
    """What a file must be before and besides its chunks.

    Attributes:
        size_bytes: of the whole file.
        head_bytes: before the first chunk.
        xxh3: of those; None if they were verified already.
    """

    size_bytes: int
    head_bytes: int
    xxh3: str | None


@dataclass(frozen=True, kw_only=True)
class Found:
    """A checkpoint whose tensors were not read yet.

    Attributes:
        path: where it lies.
        format: the name of its format.
        version: of the format; 0 if it has none.
        size_bytes: of all its files.
        structure: makes a tree of the tensors; see `plugframe.checkpoint.join`.
        tensors: by name.
        files: by name in the folder; of a single file, the one name is empty.
        info: plain values about the run that saved it.
        identity: differs from that of any other checkpoint.
    """

    path: str
    format: str
    version: int
    size_bytes: int
    structure: Any
    tensors: Mapping[str, Laid]
    files: Mapping[str, Head]
    info: Mapping[str, Any] = field(default_factory=dict)
    identity: str = ""
