"""Read a checkpoint at a URL: its manifest, then its files in chunks, verified by checksum."""

from __future__ import annotations

import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from plugframe.checkpoint import Contents, join
from plugframe.errors import CheckpointCorruptError, CheckpointNotFoundError
from plugframe_builtins._shared.checkpoint_files import sharded_format
from plugframe_builtins._shared.checkpoint_files.files import Files
from plugframe_builtins._shared.checkpoint_files.index import Index
from plugframe_builtins._shared.checkpoint_files.reading import read_state
from plugframe_builtins._shared.checkpoint_files.source import FileSource
from plugframe_builtins.remote_checkpoint.storage import RemoteFolder, checkpoint_errors

#: Read-ahead for sequential reads: requests cost more than bytes.
_AHEAD_BYTES = 4 * 1024 * 1024


class _Stretch(NamedTuple):
    file: str
    start: int
    data: bytes
    read_to: int


class RemoteFiles(Files):
    """The files of a checkpoint at a URL.

    Unlike an open local file, a remote one is gone once another save replaces the checkpoint: a tensor
    read after that raises, and never has another value.
    """

    def __init__(self, folder: RemoteFolder, names: Iterable[str]) -> None:
        super().__init__(folder.url, names)
        self._folder = folder
        self._sizes: dict[str, int | None] | None = None
        self._last = threading.local()

    def name(self, file: str) -> str:
        return self._folder.shown(file)

    def size(self, file: str) -> int | None:
        with checkpoint_errors(f"cannot read {self.name(file)}"):
            if self._sizes is None:
                # One listing for all files; sizes missing there are requested one by one.
                self._sizes = {}
                with suppress(Exception):
                    self._sizes.update(self._folder.sizes())
            if self._sizes.get(file) is None:
                self._sizes[file] = self._folder.size(file)
            return self._sizes[file]

    def read_into(self, buffer: memoryview, file: str, start: int, what: str) -> None:
        with checkpoint_errors(f"cannot read {self.name(file)}"):
            try:
                data = self._read(file, start, len(buffer))
            except FileNotFoundError:
                raise CheckpointCorruptError(f"{self.path} is incomplete: the file {file} is missing.") from None
        if len(data) != len(buffer):
            raise CheckpointCorruptError(
                f"{self.name(file)} is truncated: {what} has {len(buffer)} bytes, found {len(data)}."
            )
        buffer[:] = data

    def _read(self, file: str, start: int, size: int) -> memoryview:
        last: _Stretch | None = getattr(self._last, "stretch", None)
        if last is not None and last.file != file:
            last = None
        if last is None or not last.start <= start <= start + size <= last.start + len(last.data):
            ahead = last is not None and start == last.read_to
            end = start + (max(size, _AHEAD_BYTES) if ahead else size)
            known = (self._sizes or {}).get(file)
            end = end if known is None else max(start, min(end, known))
            data = self._folder.read(file, start, end) if end > start else b""
            last = _Stretch(file, start, data, start)
        self._last.stretch = last._replace(read_to=start + size)
        return memoryview(last.data)[start - last.start : start - last.start + size]


def find(folder: RemoteFolder) -> Index:
    """Return the index in a folder's manifest.

    Raises:
        CheckpointError: if the folder is missing, or not a checkpoint.
        CheckpointCorruptError: if the manifest is damaged.
    """
    with checkpoint_errors(f"cannot read {folder.url}"):
        manifest = read_manifest(folder)
        names = folder.sizes() if manifest is None else {}
        if manifest is None and not names:
            raise CheckpointNotFoundError(f"{folder.url} does not exist.")
        found = sharded_format.unpack(folder.url.rstrip("/"), manifest, lambda: names or folder.sizes())
    return replace(found, path=folder.url)


def read_manifest(folder: RemoteFolder) -> bytes | None:
    """Return the manifest's bytes, None if there is none."""
    try:
        return folder.read(sharded_format.MANIFEST)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read(folder: RemoteFolder, *, lazy: bool, rank: int, num_ranks: int) -> tuple[dict[str, Any], str]:
    """Return the verified state in a folder, and the checkpoint's unique identity.

    Args:
        folder: the checkpoint's folder.
        lazy: return lazy tensors; each rank then verifies its share of the data.
        rank: this rank.
        num_ranks: number of ranks.
    """
    found = find(folder)
    files = RemoteFiles(folder, found.files)
    state = read_state(found, files, lazy=lazy, rank=rank, num_ranks=num_ranks)
    return state, found.identity


def inspect(folder: RemoteFolder) -> Contents:
    """Return the contents of a checkpoint, without reading tensors."""
    found = find(folder)
    tensors = FileSource(found, RemoteFiles(folder, found.files)).tensors()
    return Contents(
        format=found.format,
        version=found.version,
        size_bytes=found.size_bytes,
        num_files=len(found.files) + 1,
        verifiable=True,
        info=found.info,
        state=join(tensors, found.structure, where=found.path),
    )
