"""Reading the file: every byte that is returned was read once and verified as read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plugframe.checkpoint import (
    SEGMENT_BYTES,
    Checksum,
    Entry,
    Manifest,
    as_bytes,
    dtype_name,
    join,
    parse_structure,
)
from plugframe.errors import CheckpointCorruptError
from plugframe_builtins.safetensors_checkpoint.layout import (
    MANIFEST,
    MAX_HEADER_BYTES,
    STRUCTURE,
    Slot,
    parse_header,
)

#: Small tensors share a thread's turn.
_TURN_BYTES = 4 * 1024 * 1024

#: Read and verified at a time: still in the processor's cache when its checksum is taken.
_CHUNK_BYTES = 1024 * 1024


def read(file: BinaryIO, path: str) -> dict[str, Any]:
    """Return the state in a file of this layout.

    Raises:
        CheckpointCorruptError: naming what is not what was written, with what was expected and found.
    """
    slots, data_at = _read_header(file, path)
    source = _Source(file.fileno(), path, data_at)
    manifest = Manifest.from_bytes(_read_raw(source, slots[MANIFEST]), where=path)
    entries = {**manifest.tensors, STRUCTURE: manifest.structure}
    _check_slots(slots, entries, path)

    structure_bytes = torch.empty(slots[STRUCTURE].shape, dtype=torch.uint8, device="cpu")
    tensors = {name: torch.empty(slots[name].shape, dtype=slots[name].dtype, device="cpu") for name in manifest.tensors}
    parts = [Part(STRUCTURE, structure_bytes, slots[STRUCTURE].start, manifest.structure)]
    parts += [Part(name, tensor, slots[name].start, entries[name]) for name, tensor in tensors.items()]
    _read_parts(source, parts)
    try:
        structure = parse_structure(bytes(as_bytes(structure_bytes)))
    except ValueError as error:
        raise CheckpointCorruptError(f"{path}: its structure is not one: {error}.") from error
    state = join(tensors, structure, where=path)
    if not isinstance(state, dict):
        raise CheckpointCorruptError(f"{path}: its structure is a {type(state).__name__}, not a dict.")
    return state


@dataclass(frozen=True)
class Part:
    """A tensor to fill, where its bytes are, and what they must be."""

    name: str
    tensor: Tensor
    start: int
    entry: Entry


@dataclass(frozen=True)
class _Source:
    descriptor: int
    path: str
    data_at: int

    def read_into(self, buffer: memoryview, start: int, name: str) -> None:
        """Fill `buffer` from `start` bytes after the header; threads may do so at the same time."""
        done = 0
        while done < len(buffer):
            count = os.preadv(self.descriptor, [buffer[done:]], self.data_at + start + done)
            if count == 0:
                raise CheckpointCorruptError(
                    f"{self.path} is truncated: tensor {name!r} has {len(buffer)} bytes, found {done}."
                )
            done += count


def _read_header(file: BinaryIO, path: str) -> tuple[dict[str, Slot], int]:
    size = os.fstat(file.fileno()).st_size
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER_BYTES):
        raise CheckpointCorruptError(
            f"{path} is truncated, or its first 8 bytes are not what was written: they announce a header of "
            f"{length} bytes, found {max(size - 8, 0)} bytes after them."
        )
    slots = parse_header(file.read(length), where=path)
    expected = 8 + length + slots[MANIFEST].end
    if size != expected:
        what = "is truncated" if size < expected else "is longer than what was written"
        raise CheckpointCorruptError(f"{path} {what}: expected {expected} bytes, found {size}.")
    return slots, 8 + length


def _check_slots(slots: Mapping[str, Slot], entries: Mapping[str, Entry], path: str) -> None:
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


def _read_raw(source: _Source, slot: Slot) -> bytes:
    buffer = bytearray(slot.size_bytes)
    source.read_into(memoryview(buffer), slot.start, MANIFEST)
    return bytes(buffer)


def _read_parts(source: _Source, parts: list[Part]) -> None:
    turns = _turns(parts)
    if len(turns) == 1:
        damaged = _read_turn(source, turns[0])
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            damaged = [text for texts in pool.map(lambda turn: _read_turn(source, turn), turns) for text in texts]
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CheckpointCorruptError(
            f"{source.path}: {damaged[0]}{more}. Load another checkpoint, or a copy of this one."
        )


def _turns(parts: list[Part]) -> list[list[tuple[Part, int]]]:
    """Group the segments of all parts into turns of about equal size: a part and a segment's number each."""
    turns: list[list[tuple[Part, int]]] = [[]]
    room = _TURN_BYTES
    for part in parts:
        for number in range(-(-part.tensor.nbytes // SEGMENT_BYTES)):
            if room <= 0:
                turns.append([])
                room = _TURN_BYTES
            turns[-1].append((part, number))
            room -= min(part.tensor.nbytes - number * SEGMENT_BYTES, SEGMENT_BYTES)
    return turns


def _read_turn(source: _Source, turn: list[tuple[Part, int]]) -> list[str]:
    return [text for part, number in turn if (text := _read_segment(source, part, number))]


def _read_segment(source: _Source, part: Part, number: int) -> str | None:
    start = number * SEGMENT_BYTES
    buffer = as_bytes(part.tensor)[start : start + SEGMENT_BYTES]
    checksum = Checksum()
    for offset in range(0, len(buffer), _CHUNK_BYTES):
        chunk = buffer[offset : offset + _CHUNK_BYTES]
        source.read_into(chunk, part.start + start + offset, part.name)
        checksum.update(chunk)
    found, expected = checksum.result(), part.entry.crc32[number : number + 1]
    if found == expected:
        return None
    return (
        f"tensor {part.name!r} is not what was written: bytes {start} to {start + len(buffer)}, "
        f"crc32 expected {', '.join(expected) or 'nothing'}, found {found[0]}"
    )
