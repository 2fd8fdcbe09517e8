"""Read the state of an open checkpoint, local or remote, and verify every byte by checksum."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from plugframe.checkpoint import StoredTensor, join
from plugframe.errors import CheckpointCorruptError
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Chunk, Index, TensorLayout
from plugframe_builtins._shared.checkpoint_files.verification import Part, check_sizes, headers_of, parts_of, read_parts


def read_state(found: Index, files: Files, *, lazy: bool, rank: int, num_ranks: int) -> dict[str, Any]:
    """Return the verified state of a checkpoint.

    Args:
        lazy: return lazy tensors; each rank then verifies its share of the data, and together they verify all.

    Raises:
        CheckpointCorruptError: naming the first damaged part.
    """
    check_sizes(found, files)
    tensors: dict[str, Tensor | StoredTensor] = {}
    if lazy:
        from plugframe_builtins._shared.checkpoint_files.source import FileSource

        read_parts(files, parts_of(found), share=rank, num_shares=num_ranks)
        tensors.update(FileSource(found, files).tensors())
    else:
        tensors.update(_read_all(found, files))
    state = join(tensors, found.structure, where=found.path)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{found.path}: its structure is a {type(state).__name__}, not a dict.")
    return state


def _read_all(found: Index, files: Files) -> dict[str, Tensor]:
    """Read every tensor; each byte is read once and verified."""
    full = {name: torch.empty(t.shape, dtype=t.dtype, device="cpu") for name, t in found.tensors.items()}
    parts = headers_of(found)
    strided: list[tuple[str, TensorLayout, Chunk, Tensor]] = []
    for name, layout in found.tensors.items():
        for chunk in layout.chunks:
            box = _box(full[name], chunk)
            if box.is_contiguous():
                parts.append(_part(name, layout, chunk, box))
            else:
                strided.append((name, layout, chunk, box))
    read_parts(files, sorted(parts, key=lambda part: (part.file, part.start)))
    # One after another, to need memory for only one at a time.
    for name, layout, chunk, box in strided:
        contiguous = torch.empty(box.shape, dtype=box.dtype, device="cpu")
        read_parts(files, [_part(name, layout, chunk, contiguous)])
        box.copy_(contiguous)
    return full


def _box(tensor: Tensor, chunk: Chunk) -> Tensor:
    for dim, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
        tensor = tensor.narrow(dim, offset, size)
    return tensor


def _part(name: str, layout: TensorLayout, chunk: Chunk, tensor: Tensor) -> Part:
    assert chunk.xxh3 is not None
    size_bytes = math.prod(chunk.sizes) * layout.dtype.itemsize
    return Part(f"tensor {name!r}", chunk.file, chunk.start, size_bytes, chunk.xxh3, tensor)
