"""Reading the parts of files against their checksums: into tensors, or only past them."""

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
from plugframe_builtins._shared.checkpoint_files.index import Found

#: Small parts share a thread's turn.
_TURN_BYTES = 4 * 1024 * 1024

#: Read and verified at a time: still in the processor's cache when its checksum is taken.
_CHUNK_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Part:
    """A stretch of a file, what its bytes must be, and the tensor to put them into, None for none.

    Attributes:
        what: for messages: ``tensor 'model.weight'``.
        tensor: None if its bytes are only to be verified.
        header: whether it is the header of a file, and no tensor.
    """

    what: str
    file: str
    start: int
    size_bytes: int
    xxh3: tuple[str, ...]
    tensor: Tensor | None = None
    header: bool = False


def headers_of(found: Found) -> list[Part]:
    """Return the headers of the files that have a checksum."""
    return [
        Part(f"the header of {name}", name, 0, head.head_bytes, (head.xxh3,), header=True)
        for name, head in found.files.items()
        if head.xxh3 is not None
    ]


def parts_of(found: Found) -> list[Part]:
    """Return everything in the files that has a checksum, in the order in which it lies there."""
    parts = headers_of(found)
    for name, laid in found.tensors.items():
        for chunk in laid.chunks:
            if chunk.xxh3 is not None:
                size_bytes = math.prod(chunk.sizes) * laid.dtype.itemsize
                parts.append(Part(f"tensor {name!r}", chunk.file, chunk.start, size_bytes, chunk.xxh3))
    return sorted(parts, key=lambda part: (part.file, part.start))


def check_sizes(found: Found, files: Files) -> None:
    """Check that every file is there and as long as it was.

    Raises:
        CheckpointCorruptError: naming the first that is not.
    """
    for name, head in found.files.items():
        size = files.size(name)
        if size is None:
            lost = _spell(_cut_off(found, name, 0), "with ")
            raise CheckpointCorruptError(
                f"{found.path} is not whole: the file {name} is missing: expected {head.size_bytes} bytes{lost}, "
                "found no file."
            )
        if size != head.size_bytes:
            text = wrong_size(head.size_bytes, size, _cut_off(found, name, size))
            raise CheckpointCorruptError(f"{files.name(name)} {text}.")


def wrong_size(expected: int, found: int, lost: Sequence[str]) -> str:
    """Return what is wrong with a file's size, and which tensors it costs."""
    what = "is truncated" if found < expected else "is longer than what was written"
    return f"{what}: expected {expected} bytes, found {found}{_spell(lost, 'which cuts off ')}"


def _cut_off(found: Found, file: str, size_bytes: int) -> list[str]:
    """Return the tensors of which a part lies in a file beyond its first bytes."""
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
    """Read one share of the parts and compare their checksums.

    Args:
        files: where they lie.
        parts: what to read.
        share: the number of this share, of as many as `num_shares`.
        num_shares: into how many equal shares the parts fall, all together.

    Raises:
        CheckpointCorruptError: naming the first that is not what was written, with what was expected and found.
    """
    turns = _turns(parts)[share::num_shares]
    if len(turns) <= 1:
        damaged = [text for turn in turns for text in _read_turn(files, turn)]
    else:
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            damaged = [text for texts in pool.map(lambda turn: _read_turn(files, turn), turns) for text in texts]
    # Sorted: a tensor tells more than the header of its file.
    damaged.sort(key=lambda each: each[0])
    if damaged:
        more = f" (and {len(damaged) - 1} more)" if len(damaged) > 1 else ""
        raise CheckpointCorruptError(f"{damaged[0][1]}{more}. Load another checkpoint, or a copy of this one.")


def _turns(parts: Sequence[Part]) -> list[list[tuple[Part, int]]]:
    """Group the segments of all parts into turns of about equal size: a part and a segment's number each."""
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
    """Return what is damaged: whether it is a header, and the text."""
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
