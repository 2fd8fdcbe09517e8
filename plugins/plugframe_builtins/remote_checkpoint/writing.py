"""Write a checkpoint to a URL: a data file per rank, then rank 0's manifest, which commits them.

Committed data is never overwritten: data files have names unique to a save, and the manifest is
written beside the old one and then replaces it, which object stores (by a server-side copy) and file systems (by a
rename) do atomically.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from plugframe.checkpoint import Piece, digest
from plugframe.errors import CheckpointError
from plugframe_builtins._shared.checkpoint_files import sharded_format, tensor_file
from plugframe_builtins._shared.checkpoint_files.coverage import fills
from plugframe_builtins._shared.checkpoint_files.index import Chunk, Head, TensorLayout
from plugframe_builtins.remote_checkpoint.reading import read_manifest
from plugframe_builtins.remote_checkpoint.storage import RemoteFolder


@dataclass(frozen=True, kw_only=True)
class Written:
    """A rank's data file, None if it wrote nothing, and the chunks in it."""

    file: str | None = None
    head: Head | None = None
    chunks: Mapping[str, tuple[torch.dtype, tuple[int, ...], Chunk]]


def check(folder: RemoteFolder) -> bool:
    """Raise if the folder may not become a checkpoint; return whether it holds anything.

    Raises:
        CheckpointError: naming the obstacle.
    """
    names = folder.sizes()
    sharded_format.check_names(names, read_manifest(folder) if sharded_format.MANIFEST in names else None, folder.url)
    return bool(names)


def write(folder: RemoteFolder, save_id: str, rank: int, pieces: Mapping[str, Piece]) -> Written:
    """Write this rank's data file."""
    if not pieces:
        return Written(chunks={})
    name = sharded_format.data_name(save_id, rank)
    labels: dict[str, str] = {}
    # Descending item sizes keep every tensor aligned without padding, which the format forbids.
    for of in sorted(pieces, key=lambda of: -pieces[of].tensor.dtype.itemsize):
        labels[_label(of, pieces[of], labels)] = of
    tensors = {label: pieces[of].tensor for label, of in labels.items()}
    slots = tensor_file.place({label: (tensor.dtype, tuple(tensor.shape)) for label, tensor in tensors.items()})
    header = tensor_file.build_plain_header(slots, where=folder.url)
    with folder.writing(name) as file:
        file.write(header)
        checksums = tensor_file.write_tensors(file, tensors)
    chunks = {}
    for label, of in labels.items():
        piece, slot = pieces[of], slots[label]
        chunk = Chunk(
            offsets=tuple(piece.offsets),
            sizes=slot.shape,
            file=name,
            start=len(header) + slot.start,
            xxh3=checksums[label],
        )
        chunks[of] = (slot.dtype, tuple(piece.shape), chunk)
    end = max(slot.end for slot in slots.values())
    head = Head(size_bytes=len(header) + end, head_bytes=len(header), xxh3=digest(header))
    return Written(file=name, head=head, chunks=chunks)


def _label(name: str, piece: Piece, taken: Mapping[str, str]) -> str:
    """Return a piece's name in its file: the tensor's name, plus its box if it is a shard."""
    sizes = tuple(piece.tensor.shape)
    if sizes != tuple(piece.shape):
        box = zip(piece.offsets, sizes, strict=True)
        name += f"[{','.join(f'{offset}:{offset + size}' for offset, size in box)}]"
    while name in taken or name == "__metadata__":
        name += "#"
    return name


def commit(
    folder: RemoteFolder, save_id: str, written: Sequence[Written], structure: Any, info: Mapping[str, Any]
) -> None:
    """Replace the manifest once all ranks have written, then remove the old files.

    Called on rank 0.
    """
    files = {each.file: each.head for each in written if each.file is not None and each.head is not None}
    data = sharded_format.pack(structure=structure, info=info, files=files, tensors=_tensors(folder, written))
    _check_there(folder, files)
    draft = _draft(save_id)
    with folder.writing(draft) as file:
        file.write(data)
    try:
        folder.rename(draft, sharded_format.MANIFEST)
    except Exception:
        # A store may succeed and still report an error.
        if read_manifest(folder) != data:
            raise
    # The checkpoint is committed; files that cannot be removed now are removed by the next save.
    with suppress(Exception):
        for name in folder.sizes():
            if sharded_format.is_ours(name) and name != sharded_format.MANIFEST and name not in files:
                folder.remove(name)


def abandon(folder: RemoteFolder, save_id: str, *, made: bool) -> None:
    """Remove the files of a save that failed on all ranks, as far as possible. Called on rank 0.

    Args:
        folder: the checkpoint's folder.
        save_id: of the save.
        made: whether the folder was empty before.
    """
    # The save's error matters more; files that cannot be removed now are removed by the next save.
    with suppress(Exception):
        manifest = read_manifest(folder)
        if manifest is not None and save_id.encode("ascii") in manifest:
            return
        for name in folder.sizes():
            if name.startswith(f"{save_id}-") or name == _draft(save_id):
                folder.remove(name)
        if made and not folder.sizes():
            folder.remove_empty()


def _draft(save_id: str) -> str:
    return f".{sharded_format.MANIFEST}.tmp-{save_id}"


def _check_there(folder: RemoteFolder, files: Mapping[str, Head]) -> None:
    """Raise unless the files arrived, and no concurrent save removed them."""
    sizes = folder.sizes()
    for name, head in files.items():
        size = sizes.get(name)
        size = folder.size(name) if size is None else size
        if size != head.size_bytes:
            found = "it is missing" if size is None else f"found {size}"
            raise CheckpointError(
                f"cannot write {folder.url}: {name} should have {head.size_bytes} bytes there, {found}: is another "
                "job saving to it, or do the nodes see different storage? What was there before is untouched."
            )


def _tensors(folder: RemoteFolder, written: Sequence[Written]) -> dict[str, TensorLayout]:
    merged: dict[str, tuple[torch.dtype, tuple[int, ...], list[Chunk]]] = {}
    for each in written:
        for name, (dtype, shape, chunk) in each.chunks.items():
            merged.setdefault(name, (dtype, shape, []))[2].append(chunk)
    tensors: dict[str, TensorLayout] = {}
    for name, (dtype, shape, chunks) in merged.items():
        chunks.sort(key=lambda chunk: chunk.offsets)
        filled = sum(math.prod(chunk.sizes) for chunk in chunks)
        if not fills(shape, [(chunk.offsets, chunk.sizes) for chunk in chunks]):
            raise CheckpointError(
                f"cannot write {folder.url}: the parts of {name!r} over all ranks have {filled} elements, the full one "
                f"has {math.prod(shape)}; what was there before is untouched."
            )
        tensors[name] = TensorLayout(dtype=dtype, shape=shape, chunks=tuple(chunks))
    return tensors


def remove(folder: RemoteFolder) -> None:
    """Remove a checkpoint: its manifest first, so that the rest is not a checkpoint."""
    names = folder.sizes()
    for name in sorted(names, key=lambda name: name != sharded_format.MANIFEST):
        folder.remove(name)
    with suppress(FileNotFoundError):  # an object store has no folders
        folder.remove_empty()
