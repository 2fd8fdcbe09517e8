"""The plain safetensors layout: an eight-byte length, a JSON header, the tensors' bytes one after another."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch
from torch import Tensor

from plugframe.checkpoint import SEGMENT_BYTES, Checksums, StoredTensor, parse_structure, pieces, replacing
from plugframe.errors import CheckpointCorruptError, CheckpointError

#: Limit of the format on the header's size.
MAX_HEADER_BYTES = 100_000_000

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


class UnknownDtype(ValueError):
    """A header names a dtype that torch lacks."""


@dataclass(frozen=True, kw_only=True)
class Slot:
    """Byte range of one tensor: `start` and `end` count from the end of the header."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def size_bytes(self) -> int:
        return self.end - self.start


def place(tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> dict[str, Slot]:
    """Return adjacent slots for dtypes and shapes, in order."""
    slots: dict[str, Slot] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        slots[name] = Slot(dtype=dtype, shape=shape, start=start, end=end)
    return slots


def pack_slots(slots: Mapping[str, Slot]) -> str:
    """Return a header's JSON without its opening brace."""
    entries = {
        name: {"dtype": CODES[slot.dtype], "shape": slot.shape, "data_offsets": (slot.start, slot.end)}
        for name, slot in slots.items()
    }
    return json.dumps(entries, separators=(",", ":"))[1:]


def unpack_slots(header: bytes) -> dict[str, Slot]:
    """Return the slots in a header's JSON.

    Raises:
        UnknownDtype: if it names a dtype that torch lacks.
        ValueError, TypeError, KeyError or AttributeError: if it is not such JSON.
    """
    entries = parse_structure(header)
    return {name: _slot(entry) for name, entry in entries.items() if name != "__metadata__"}


def _slot(entry: Any) -> Slot:
    start, end = entry["data_offsets"]
    code = entry["dtype"]
    if not isinstance(code, str) or code not in _DTYPES:
        raise UnknownDtype(f"dtype {str(code)[:20]!r}")
    return Slot(dtype=_DTYPES[code], shape=tuple(entry["shape"]), start=start, end=end)


def check_slots(slots: Mapping[str, Slot], *, where: str) -> None:
    """Raise unless the slots are adjacent, in order, and fit their shapes.

    Raises:
        CheckpointCorruptError: naming the first invalid slot.
    """
    end = 0
    for name, slot in slots.items():
        valid = all(type(size) is int and 0 <= size < 2**63 for size in (slot.start, slot.end, *slot.shape))
        size_bytes = math.prod(slot.shape) * slot.dtype.itemsize if valid else -1
        extent = math.prod(max(size, 1) for size in slot.shape) if valid else 0
        if extent >= 2**59 or slot.start != end or slot.size_bytes != size_bytes:
            raise CheckpointCorruptError(f"{where}: tensor {name!r} is out of place in its header.")
        end = slot.end


def build_plain_header(slots: Mapping[str, Slot], *, where: str) -> bytes:
    """Return the bytes of a plain file before the first tensor.

    Raises:
        CheckpointError: if there are too many tensors for one file.
    """
    # Other safetensors tools expect "format".
    text = '{"__metadata__":{"format":"pt"}' + (f",{pack_slots(slots)}" if slots else "}")
    # Aligned tensor data can be mapped to memory.
    text += " " * (-len(text) % 8)
    check_header_size(len(text), len(slots), where=where)
    return len(text).to_bytes(8, "little") + text.encode("ascii")


def check_header_size(size: int, num_tensors: int, *, where: str) -> None:
    """Raise if a header exceeds the format's limit."""
    if size > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"cannot write {where}: {num_tensors} tensors need a header of {size} bytes, and the format allows "
            f"{MAX_HEADER_BYTES}; save fewer, larger tensors."
        )


def write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor | StoredTensor]) -> dict[str, tuple[str, ...]]:
    """Write the tensors' bytes one after another and return the checksums of each."""
    with Checksums() as checksums:
        for name, tensor in tensors.items():
            checksums.begin(name)
            for piece in pieces(tensor, max_bytes=SEGMENT_BYTES):
                file.write(checksums.add(name, piece))
        return checksums.result()


def write_plain(path: str, tensors: Mapping[str, Tensor | StoredTensor]) -> None:
    """Write tensors to a plain safetensors file at `path`, replacing an existing file.

    Raises:
        CheckpointError: an existing file stays untouched.
    """
    # Descending item sizes keep every tensor aligned without padding, which the format forbids.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in ordered.items():
        if tensor.dtype not in CODES:
            raise CheckpointError(f"cannot write {path}: {name!r} is of {tensor.dtype}, which the format cannot hold.")
    slots = place({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()})
    header = build_plain_header(slots, where=path)
    end = max((slot.end for slot in slots.values()), default=0)
    with replacing(path, size_bytes=len(header) + end) as file:
        file.write(header)
        write_tensors(file, ordered)
