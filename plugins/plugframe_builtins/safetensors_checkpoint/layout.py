"""The layout of the file: an eight-byte length, a JSON header, and the tensors' bytes one after another.

That is the safetensors format, so every reader of safetensors reads it. Two of its tensors are ours: the
structure that makes a tree of the others, and the manifest. The header opens with the version of this layout
and with its own checksum, in a place that no later version may move.
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from plugframe.errors import CheckpointCorruptError, CheckpointError

FORMAT = "plugframe safetensors"
VERSION = 1
STRUCTURE = "__plugframe__.structure"
MANIFEST = "__plugframe__.manifest"

#: The format itself allows no longer header.
MAX_HEADER_BYTES = 100_000_000

#: What the names of our own tensors and metadata begin with.
MARK = b'"__plugframe__.'
_MARK_AT = 8 + len('{"__metadata__":{')
_OPENING = '{"__metadata__":{"__plugframe__.version":"%d","__plugframe__.header_crc32":"%08x"'
_OPENING_FOUND = re.compile(
    rb'\{"__metadata__":\{"__plugframe__\.version":"(\d{1,9})","__plugframe__\.header_crc32":"([0-9a-f]{8})"'
)

CODES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {code: dtype for dtype, code in CODES.items()}


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Where one tensor lies: `start` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def opens(head: bytes) -> bool:
    """Say whether a file that begins with `head`, perhaps cut off or damaged, is one of this layout."""
    opening = b'{"__metadata__":{' + MARK
    return opening.startswith(head[8 : 8 + len(opening)]) or head[_MARK_AT : _MARK_AT + len(MARK)] == MARK


def place(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Slot]:
    """Return a slot for each dtype and shape, in order, without gaps."""
    slots: dict[str, Slot] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        slots[name] = Slot(dtype=dtype, shape=shape, start=start, end=end)
    return slots


def build_header(slots: Mapping[str, Slot], *, where: str) -> bytes:
    """Return the first bytes of the file, up to the first tensor.

    Raises:
        CheckpointError: if there are too many tensors for one file.
    """
    entries = {
        name: {"dtype": CODES[slot.dtype], "shape": slot.shape, "data_offsets": (slot.start, slot.end)}
        for name, slot in slots.items()
    }
    # "format" is what other tools of the format look for.
    rest = ',"format":"pt"},' + json.dumps(entries, separators=(",", ":"))[1:]
    size = len(_OPENING % (VERSION, 0)) + len(rest)
    # The tensors' bytes begin aligned, for readers that map them.
    rest += " " * (-size % 8)
    size += -size % 8
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"cannot write {where}: {len(slots)} tensors need a header of {size} bytes, and the format allows "
            f"{MAX_HEADER_BYTES}; save fewer, larger tensors."
        )
    crc32 = zlib.crc32((_OPENING % (VERSION, 0) + rest).encode("ascii"))
    return size.to_bytes(8, "little") + (_OPENING % (VERSION, crc32) + rest).encode("ascii")


def parse_header(header: bytes, *, where: str) -> dict[str, Slot]:
    """Return the slots of a header, without its leading length, once it is known to be what was written.

    Raises:
        CheckpointCorruptError: if a byte of it is not what was written.
        CheckpointError: if a newer version of this layout wrote it.
    """
    opening = _OPENING_FOUND.match(header)
    if opening is None:
        raise CheckpointCorruptError(f"{where}: its header is not what was written: it opens with {header[:40]!r}.")
    written = int(opening[2], 16)
    crc32 = zlib.crc32(header[: opening.start(2)] + b"0" * 8 + header[opening.end(2) :])
    if written != crc32:
        raise CheckpointCorruptError(
            f"{where}: its header is not what was written: crc32 expected {written:08x}, found {crc32:08x}."
        )
    if int(opening[1]) > VERSION:
        raise CheckpointError(
            f"{where} was written by a newer plugframe (format {int(opening[1])}, this one reads {VERSION}): "
            "upgrade plugframe."
        )
    try:
        entries = json.loads(header.decode("utf-8"))
        slots = {name: _slot(entry) for name, entry in entries.items() if name != "__metadata__"}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointCorruptError(f"{where}: its header is not one of this format: {error!r}.") from error
    _check_places(slots, where)
    return slots


def _slot(entry: Any) -> Slot:
    start, end = entry["data_offsets"]
    return Slot(dtype=_DTYPES[entry["dtype"]], shape=tuple(entry["shape"]), start=start, end=end)


def _check_places(slots: Mapping[str, Slot], where: str) -> None:
    end = 0
    for name, slot in slots.items():
        whole = all(type(size) is int and 0 <= size < 2**63 for size in (slot.start, slot.end, *slot.shape))
        size_bytes = math.prod(slot.shape) * slot.dtype.itemsize if whole else -1
        extent = math.prod(max(size, 1) for size in slot.shape) if whole else 0
        if extent >= 2**59 or slot.start != end or slot.size_bytes != size_bytes:
            raise CheckpointCorruptError(f"{where}: tensor {name!r} is out of place in its header.")
        end = slot.end
    for name in (STRUCTURE, MANIFEST):
        if name not in slots:
            raise CheckpointCorruptError(f"{where}: its header lacks {name!r}.")
