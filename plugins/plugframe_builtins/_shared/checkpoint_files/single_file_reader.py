"""Read the single-file format; every byte is verified as it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plugframe.checkpoint import Entry, Manifest, as_bytes, dtype_name, join, parse_structure, printable_cause
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins._shared.checkpoint_files import foreign, single_file
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Head, Index, one_chunk
from plugframe_builtins._shared.checkpoint_files.single_file import (
    MANIFEST,
    MAX_HEADER_BYTES,
    STRUCTURE,
    Slot,
    parse_header,
)
from plugframe_builtins._shared.checkpoint_files.verification import Part, read_parts, wrong_size


def sniff(file: BinaryIO, path: str) -> str:
    """Return the kind of a file: "own", "plain" (another tool's safetensors) or "torch"."""
    head = file.read(64)
    size = os.fstat(file.fileno()).st_size
    if size < 10:
        raise CheckpointCorruptError(f"{path} is truncated: expected a checkpoint, found {size} bytes.")
    if single_file.opens(head):
        return "own"
    length = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and length <= single_file.MAX_HEADER_BYTES:
        if length > size - 8:
            raise CheckpointCorruptError(f"{path} is truncated: its header has {length} bytes, found {size - 8}.")
            # The marker is repeated: with one damaged, the file must not pass as plain safetensors.
        file.seek(8)
        return "own" if single_file.MARK in file.read(length) else "plain"
    if head.startswith((foreign.ZIP_MAGIC, foreign.LEGACY_MAGIC)):
        return "torch"
    raise CheckpointError(
        f"{path} is not a checkpoint: it begins with {head[:8]!r}, neither safetensors nor torch.save do."
    )


def read(file: BinaryIO, path: str) -> dict[str, Any]:
    """Return the state in a single-file checkpoint.

    Raises:
        CheckpointCorruptError: naming the damaged part, with the expected and found checksum.
    """
    slots, data_at = _read_header(file, path)
    files = Files(path, [""])
    files.adopt("", file.fileno())
    manifest = _manifest(files, path, slots, data_at)
    tensors = {name: torch.empty(slots[name].shape, dtype=slots[name].dtype, device="cpu") for name in manifest.tensors}
    parts = [_part(name, entry, slots, data_at, tensors[name]) for name, entry in manifest.tensors.items()]
    structure = _structure(files, path, manifest, slots, data_at, parts)
    state = join(tensors, structure, where=path)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{path}: its structure is a {type(state).__name__}, not a dict.")
    return state


def find(file: BinaryIO, path: str) -> Index:
    """Return the index of a single-file checkpoint; header, manifest and structure are verified, tensors are not.

    Raises:
        CheckpointCorruptError: naming the damaged part, with the expected and found checksum.
    """
    slots, data_at = _read_header(file, path)
    files = Files(path, [""])
    files.adopt("", file.fileno())
    manifest = _manifest(files, path, slots, data_at)
    structure = _structure(files, path, manifest, slots, data_at, [])
    size_bytes = data_at + slots[MANIFEST].end
    return Index(
        path=path,
        format=single_file.FORMAT,
        version=single_file.VERSION,
        size_bytes=size_bytes,
        structure=structure,
        tensors={name: one_chunk(slots[name], data_at, xxh3=entry.xxh3) for name, entry in manifest.tensors.items()},
        files={"": Head(size_bytes=size_bytes, head_bytes=data_at, xxh3=None)},
        info=manifest.info,
        identity=_tail(files, size_bytes),
    )


def _read_header(file: BinaryIO, path: str) -> tuple[dict[str, Slot], int]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointCorruptError(
            f"{path} is truncated, or its first 8 bytes are not what was written: they announce a header of "
            f"{length} bytes: expected no less after them, found {max(size - 8, 0)}."
        )
    slots = parse_header(file.read(length), where=path)
    expected = 8 + length + slots[MANIFEST].end
    if size != expected:
        lost = [
            name for name, slot in slots.items() if 8 + length + slot.end > size and name not in (STRUCTURE, MANIFEST)
        ]
        raise CheckpointCorruptError(f"{path} {wrong_size(expected, size, lost)}.")
    return slots, 8 + length


def _manifest(files: Files, path: str, slots: Mapping[str, Slot], data_at: int) -> Manifest:
    buffer = bytearray(slots[MANIFEST].size_bytes)
    files.read_into(memoryview(buffer), "", data_at + slots[MANIFEST].start, f"tensor {MANIFEST!r}")
    manifest = Manifest.from_bytes(bytes(buffer), where=path)
    entries = {**manifest.tensors, STRUCTURE: manifest.structure}
    for name in [*entries, *slots]:
        if name == MANIFEST:
            continue
        slot, entry = slots.get(name), entries.get(name)
        found = (dtype_name(slot.dtype), slot.shape, slot.size_bytes) if slot else None
        expected = (entry.dtype, entry.shape, entry.size_bytes) if entry else None
        if found != expected:
            raise CheckpointCorruptError(
                f"{path}: tensor {name!r} is not what was written: expected {expected}, found {found}."
            )
    return manifest


def _part(name: str, entry: Entry, slots: Mapping[str, Slot], data_at: int, tensor: Tensor) -> Part:
    return Part(f"tensor {name!r}", "", data_at + slots[name].start, tensor.nbytes, entry.xxh3, tensor)


def _structure(
    files: Files, path: str, manifest: Manifest, slots: Mapping[str, Slot], data_at: int, others: list[Part]
) -> Any:
    """Read and return the structure, together with other parts."""
    data = torch.empty(slots[STRUCTURE].shape, dtype=torch.uint8, device="cpu")
    read_parts(files, [_part(STRUCTURE, manifest.structure, slots, data_at, data), *others])
    try:
        return parse_structure(bytes(as_bytes(data)))
    except ValueError as error:
        text = str(error)[:200]
        raise CheckpointCorruptError(f"{path}: its structure is not one: {text}.") from printable_cause(error)


def _tail(files: Files, size_bytes: int) -> str:
    buffer = bytearray(10)
    files.read_into(memoryview(buffer), "", size_bytes - 10, "the manifest")
    return buffer[:8].decode("ascii", "backslashreplace")
