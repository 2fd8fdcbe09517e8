"""Writing the file: one tensor after another, checksums taken on the way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
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
    dump_structure,
    pieces,
    replacing,
    split,
)
from plugframe_builtins.safetensors_checkpoint.layout import (
    CODES,
    FORMAT,
    MANIFEST,
    STRUCTURE,
    VERSION,
    Slot,
    build_header,
    place,
)

#: Below this, handing a checksum to another thread costs more than taking it.
_THREAD_FROM_BYTES = 256 * 1024
_MAX_PENDING = 3


def write(path: str, state: Mapping[str, Any], info: Mapping[str, Any]) -> None:
    """Write `state` at `path`, in place of what is there.

    Raises:
        CheckpointError: with what is there untouched.
    """
    tensors, tree = split(state, dtypes=CODES.keys(), where=path)
    structure = dump_structure(tree)
    # Wide elements first: then each tensor lies aligned without gaps, which the format forbids.
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))
    slots = place(
        {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in ordered.items()}
        | {STRUCTURE: (torch.uint8, (len(structure),))}
    )
    blank = {name: _blank(slot) for name, slot in slots.items()}
    manifest_bytes = len(_manifest(blank, info))
    end = slots[STRUCTURE].end
    slots[MANIFEST] = Slot(dtype=torch.uint8, shape=(manifest_bytes,), start=end, end=end + manifest_bytes)
    header = build_header(slots, where=path)

    with replacing(path, size_bytes=len(header) + slots[MANIFEST].end) as file:
        file.write(header)
        checksums = _write_tensors(file, ordered)
        file.write(structure)
        checksums[STRUCTURE] = _checksum(structure)
        entries = {name: _blank(slots[name], checksums[name]) for name in blank}
        file.write(_manifest(entries, info))


def _manifest(entries: Mapping[str, Entry], info: Mapping[str, Any]) -> bytes:
    tensors = {name: entry for name, entry in entries.items() if name != STRUCTURE}
    return Manifest(format=FORMAT, version=VERSION, structure=entries[STRUCTURE], tensors=tensors, info=info).to_bytes()


def _blank(slot: Slot, crc32: tuple[str, ...] | None = None) -> Entry:
    blank = Entry.blank(dtype=dtype_name(slot.dtype), shape=slot.shape, size_bytes=slot.size_bytes)
    return blank if crc32 is None else replace(blank, crc32=crc32)


def _checksum(data: bytes) -> tuple[str, ...]:
    checksum = Checksum()
    checksum.update(data)
    return checksum.result()


def _write_tensors(file: BinaryIO, tensors: Mapping[str, Tensor]) -> dict[str, tuple[str, ...]]:
    checksums: dict[str, Checksum] = {}
    with ThreadPoolExecutor(1) as pool:
        behind = _Behind(pool)
        for name, tensor in tensors.items():
            checksums[name] = Checksum()
            for piece in pieces(tensor, max_bytes=SEGMENT_BYTES):
                data = as_bytes(piece)
                behind.run(checksums[name].update, data, piece)
                file.write(data)
        behind.finish()
    return {name: checksum.result() for name, checksum in checksums.items()}


class _Behind:
    """Takes checksums in another thread while the file is written; both release the interpreter's lock.

    It runs one thread, so the pieces of a tensor stay in order, and lags a few pieces behind at most, so
    copies of pieces do not pile up.
    """

    def __init__(self, pool: ThreadPoolExecutor) -> None:
        self._pool = pool
        self._pending: deque[tuple[Future[None], Tensor]] = deque()

    def run(self, update: Callable[[memoryview], None], data: memoryview, owner: Tensor) -> None:
        while self._pending and self._pending[0][0].done():
            self._pending.popleft()[0].result()
        if not self._pending and len(data) < _THREAD_FROM_BYTES:
            update(data)
            return
        # `data` is the memory of `owner`, which must live until it has been read.
        self._pending.append((self._pool.submit(update, data), owner))
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft()[0].result()

    def finish(self) -> None:
        while self._pending:
            self._pending.popleft()[0].result()
