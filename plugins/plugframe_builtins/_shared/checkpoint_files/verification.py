"""Read parts of files and verify their checksums."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from plugframe.checkpoint import SEGMENT_BYTES, Checksum, as_bytes
from plugframe.errors import CheckpointCorruptError
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Index

#: Small parts are grouped into one task of a thread.
_TURN_BYTES = 4 * 1024 * 1024

#: Bytes read and verified at a time: they stay in the CPU cache for the checksum.
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Part:
    """A byte range of a file, its checksums, and the tensor to read it into.

    Attributes:
        what: name for messages: ``tensor 'model.weight'``.
        tensor: None to verify only.
        header: whether it is a file's header.
    """

    what: str
    file: str
    start: int
    size_bytes: int
    xxh3: tuple[str, ...]
    tensor: Tensor | None = None
    header: bool = False


def headers_of(found: Index) -> list[Part]:
    """Return the file headers that have a checksum, and what else is between the tensors."""
    parts = [
        Part(f"the header of {name}", name, 0, head.head_bytes, (head.xxh3,), header=True)
        for name, head in found.files.items()
        if head.xxh3 is not None
    ]
    for name, head in found.files.items():
        what = f"what is between the tensors of {name}"
        parts += [Part(what, name, gap.start, gap.size_bytes, gap.xxh3, header=True) for gap in head.gaps]
    return parts


def parts_of(found: Index) -> list[Part]:
    """Return every part that has a checksum, in file order."""
    parts = headers_of(found)
    for name, laid in found.tensors.items():
        for chunk in laid.chunks:
            if chunk.xxh3 is not None:
                size_bytes = math.prod(chunk.sizes) * laid.dtype.itemsize
                parts.append(Part(f"tensor {name!r}", chunk.file, chunk.start, size_bytes, chunk.xxh3))
    return sorted(parts, key=lambda part: (part.file, part.start))


def check_sizes(found: Index, files: Files) -> None:
    """Raise unless every file exists and has its recorded size.

    Raises:
        CheckpointCorruptError: naming the first file.
    """
    for name, head in found.files.items():
        size = files.size(name)
        if size is None:
            lost = _spell(_cut_off(found, name, 0), "with ")
            raise CheckpointCorruptError(
                f"{found.path} is incomplete: the file {name} is missing: expected {head.size_bytes} bytes{lost}, "
                "found no file."
            )
        if size != head.size_bytes:
            text = wrong_size(head.size_bytes, size, _cut_off(found, name, size))
            raise CheckpointCorruptError(f"{files.name(name)} {text}.")


def wrong_size(expected: int, found: int, lost: Sequence[str]) -> str:
    """Return the message for a wrong file size, with the tensors that are lost."""
    what = "is truncated" if found < expected else "is longer than what was written"
    return f"{what}: expected {expected} bytes, found {found}{_spell(lost, 'which cuts off ')}"


def _cut_off(found: Index, file: str, size_bytes: int) -> list[str]:
    """Return the tensors with bytes beyond the file's first `size_bytes`."""
    return [
        name
        for name, laid in found.tensors.items()
        for chunk in laid.chunks
        if chunk.file == file and chunk.start + math.prod(chunk.sizes) * laid.dtype.itemsize > size_bytes
    ]


def _spell(tensors: Sequence[str], how: str) -> str:
    more = f" (and {len(tensors) - 1} more)" if len(tensors) > 1 else ""
    return f", {how}tensor {tensors[0]!r}{more}" if tensors else ""


def read_parts(files: Files, parts: Sequence[Part], *, share: int = 0, num_shares: int = 1) -> None:
    """Read one share of the parts and verify their checksums.

    Args:
        files: the checkpoint's files.
        parts: what to read.
        share: index of this share, below `num_shares`.
        num_shares: number of equal shares of the parts.

    Raises:
        CheckpointCorruptError: naming the first damaged part, with the expected and found checksum.
    """
    turns = _turns(parts)[share::num_shares]
    if len(turns) <= 1:
        damaged = [text for turn in turns for text in _read_turn(files, turn)]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            damaged = [text for texts in pool.map(lambda turn: _read_turn(files, turn), turns) for text in texts]
        # Sorted: a damaged tensor is reported before its file's header.
    damaged.sort(key=lambda each: each[0])
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CheckpointCorruptError(f"{damaged[0][1]}{more}. Load another checkpoint, or a copy of this one.")


def _turns(parts: Sequence[Part]) -> list[list[tuple[Part, int]]]:
    """Group the segments of all parts into tasks of about equal size, as (part, segment number) pairs."""
    turns: list[list[tuple[Part, int]]] = [[]]
    room = _TURN_BYTES
    for part in parts:
        for number in range(-(-part.size_bytes // SEGMENT_BYTES)):
            if room <= 0:
                turns.append([])
                room = _TURN_BYTES
            turns[-1].append((part, number))
            room -= min(part.size_bytes - number * SEGMENT_BYTES, SEGMENT_BYTES)
    return turns


def _read_turn(files: Files, turn: list[tuple[Part, int]]) -> list[tuple[bool, str]]:
    """Return the damage found, as (is a header, message) pairs."""
    scratch = memoryview(bytearray(_CHUNK_BYTES)) if any(part.tensor is None for part, _ in turn) else memoryview(b"")
    texts = [(part, _read_segment(files, part, number, scratch)) for part, number in turn]
    return [(part.header, text) for part, text in texts if text is not None]


def _read_segment(files: Files, part: Part, number: int, scratch: memoryview) -> str | None:
    start = number * SEGMENT_BYTES
    end = min(start + SEGMENT_BYTES, part.size_bytes)
    whole = scratch if part.tensor is None else as_bytes(part.tensor)
    checksum = Checksum()
    for at in range(start, end, _CHUNK_BYTES):
        size = min(_CHUNK_BYTES, end - at)
        chunk = whole[:size] if part.tensor is None else whole[at : at + size]
        files.read_into(chunk, part.file, part.start + at, part.what)
        checksum.update(chunk)
    found, expected = checksum.result(), part.xxh3[number : number + 1]
    if found == expected:
        return None
    return (
        f"{files.name(part.file)}: {part.what} is not what was written: bytes {start} to {end}, "
        f"xxh3 expected {', '.join(expected) or 'nothing'}, found {found[0]}"
    )
