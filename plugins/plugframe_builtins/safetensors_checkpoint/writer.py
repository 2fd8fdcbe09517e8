"""Write the single-file format: one tensor after another, with checksums."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plugframe.checkpoint import (
    SEGMENT_BYTES,
    Checksum,
    Checksums,
    Entry,
    Manifest,
    StoredTensor,
    dtype_name,
    dump_structure,
    pieces,
    replacing,
    split_stored,
)
from plugframe_builtins._shared.checkpoint_files import sharded_format
from plugframe_builtins._shared.checkpoint_files.single_file import (
    CODES,
    FORMAT,
    MANIFEST,
    STRUCTURE,
    VERSION,
    Slot,
    build_header,
    place,
)


def write(path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write `state` to `path`, replacing an existing file.

    Raises:
        CheckpointError: an existing file stays untouched.
    """
    tensors, tree = split_stored(state, dtypes=CODES.keys(), where=path)
    structure = dump_structure(tree)
    # Descending item sizes keep every tensor aligned without padding, which the format forbids.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    slots = place(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
        | {STRUCTURE: (torch.uint8, (len(structure),))}
    )
    blank = {name: _blank(slot) for name, slot in slots.items()}
    manifest_bytes = len(_manifest(blank, info))
    end = slots[STRUCTURE].end
    slots[MANIFEST] = Slot(dtype=torch.uint8, shape=(manifest_bytes,), start=end, end=end + manifest_bytes)
    header = build_header(slots, where=path)

    size_bytes = len(header) + slots[MANIFEST].end
    with replacing(path, size_bytes=size_bytes, over_folder=sharded_format.is_checkpoint) as file:
        file.write(header)
        checksums = _write_tensors(file, ordered)
        file.write(structure)
        checksums[STRUCTURE] = _checksum(structure)
        entries = {
            name: Entry(dtype=entry.dtype, shape=entry.shape, size_bytes=entry.size_bytes, xxh3=checksums[name])
            for name, entry in blank.items()
        }
        file.write(_manifest(entries, info))


def _manifest(entries: Mapping[str, Entry], info: Mapping[str, Any]) -> bytes:
    tensors = {name: entry for name, entry in entries.items() if name != STRUCTURE}
    return Manifest(format=FORMAT, version=VERSION, structure=entries[STRUCTURE], tensors=tensors, info=info).to_bytes()


def _blank(slot: Slot) -> Entry:
    return Entry.blank(dtype=dtype_name(slot.dtype), shape=slot.shape, size_bytes=slot.size_bytes)


def _checksum(data: bytes) -> tuple[str, ...]:
    checksum = Checksum()
    checksum.update(data)
    return checksum.result()


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor | StoredTensor]) -> dict[str, tuple[str, ...]]:
    with Checksums() as checksums:
        for name, tensor in tensors.items():
            checksums.begin(name)
            for piece in pieces(tensor, max_bytes=SEGMENT_BYTES):
                file.write(checksums.add(name, piece))
        return checksums.result()
