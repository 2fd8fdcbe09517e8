"""The single-file format: an eight-byte length, a JSON header, and the tensors' bytes.

It is the safetensors format, readable by every safetensors reader. Two of its tensors are plugframe's own: the
structure of the state tree, and the manifest. The header begins with the format version
and its own checksum, at a position that is the same in all versions.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch

from plugframe.checkpoint import DIGEST_CHARS, MAX_MANIFEST_BYTES, digest, printable_cause
from plugframe.errors import CheckpointCorruptError, CheckpointError
from plugframe_builtins._shared.checkpoint_files.tensor_file import (
    CODES,
    MAX_HEADER_BYTES,
    Slot,
    check_header_size,
    check_slots,
    pack_slots,
    place,
    unpack_slots,
)

__all__ = [
    "CODES",
    "FORMAT",
    "MANIFEST",
    "MARK",
    "MAX_HEADER_BYTES",
    "STRUCTURE",
    "VERSION",
    "Slot",
    "build_header",
    "opens",
    "parse_header",
    "place",
]

FORMAT = "plugframe safetensors"
VERSION = 1
STRUCTURE = "__plugframe__.structure"
MANIFEST = "__plugframe__.manifest"

#: Prefix of plugframe's own tensors and metadata.
MARK = b'"__plugframe__.'
_MARK_AT = 8 + len('{"__metadata__":{')
_BLANK = "0" * DIGEST_CHARS
_OPENING = '{"__metadata__":{"__plugframe__.version":"%d","__plugframe__.header_xxh3":"%s"'
_OPENING_FOUND = re.compile(
    rb'\{"__metadata__":\{"__plugframe__\.version":"(\d{1,9})","__plugframe__\.header_xxh3":"([0-9a-f]{16})"'
)


def opens(head: bytes) -> bool:
    """Return whether a file that begins with `head`, perhaps truncated or damaged, is of this format."""
    opening = b'{"__metadata__":{' + MARK
    return opening.startswith(head[8 : 8 + len(opening)]) or head[_MARK_AT : _MARK_AT + len(MARK)] == MARK


def build_header(slots: Mapping[str, Slot], *, where: str) -> bytes:
    """Return the bytes of the file before the first tensor.

    Raises:
        CheckpointError: if there are too many tensors for one file.
    """
    # Other safetensors tools expect "format".
    rest = ',"format":"pt"},' + pack_slots(slots)
    size = len(_OPENING % (VERSION, _BLANK)) + len(rest)
    # Aligned tensor data can be mapped to memory.
    rest += " " * (-size % 8)
    size += -size % 8
    check_header_size(size, len(slots), where=where)
    xxh3 = digest((_OPENING % (VERSION, _BLANK) + rest).encode("ascii"))
    return size.to_bytes(8, "little") + (_OPENING % (VERSION, xxh3) + rest).encode("ascii")


def parse_header(header: bytes, *, where: str) -> dict[str, Slot]:
    """Return the slots of a verified header, without its leading length.

    Raises:
        CheckpointCorruptError: if the header is damaged.
        CheckpointError: if it is of a newer version of this format.
    """
    opening = _OPENING_FOUND.match(header)
    if opening is None:
        expected = (_OPENING % (VERSION, "…"))[:40]
        found = header[: len(expected)].decode("ascii", "backslashreplace")
        raise CheckpointCorruptError(
            f"{where}: its header is not what was written: expected it to open with {expected}, found {found}."
        )
    written = opening[2].decode()
    xxh3 = digest(header[: opening.start(2)] + _BLANK.encode() + header[opening.end(2) :])
    if written != xxh3:
        raise CheckpointCorruptError(
            f"{where}: its header is not what was written: xxh3 expected {written}, found {xxh3}."
        )
    if int(opening[1]) > VERSION:
        raise CheckpointError(
            f"{where} was written by a newer plugframe (format {int(opening[1])}, this one reads {VERSION}): "
            "upgrade plugframe."
        )
    try:
        slots = unpack_slots(header)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        text = repr(error)[:200]
        raise CheckpointCorruptError(f"{where}: its header is not one of this format: {text}.") from printable_cause(
            error
        )
    check_slots(slots, where=where)
    for name in (STRUCTURE, MANIFEST):
        if name not in slots:
            raise CheckpointCorruptError(f"{where}: its header lacks {name!r}.")
        slot = slots[name]
        if slot.dtype is not torch.uint8 or len(slot.shape) != 1 or slot.size_bytes > MAX_MANIFEST_BYTES:
            raise CheckpointCorruptError(f"{where}: {name!r} is not what was written.")
    return slots
